//! What the soak does, one thing at a time or two at once, and what may come of each.

use std::collections::{BTreeMap, BTreeSet};

use ratoon_engine::fork::ForkSpec;
use ratoon_tests::{Done, finish};

use super::left::pagers;
use super::model::{Contents, Saved, discarded};
use super::population::{Doubt, Fate, MOST_MACHINES, MOST_SAVED, Population, kill};

type Act = fn(&mut Population);

/// Each with its weight.
const ACTS: &[(&str, u64, Act)] = &[
    ("write", 5, write),
    ("look", 2, look),
    ("fork", 3, fork),
    ("fork by the engine", 3, fork_by_engine),
    ("fork of a snapshot", 1, fork_snapshot),
    ("fork of a paused machine", 1, fork_paused),
    ("snapshot", 3, snapshot),
    ("restore", 2, restore),
    ("rollback", 3, rollback),
    ("commit", 2, commit),
    ("suspend", 1, suspend),
    ("two at once", 2, two_at_once),
    ("remove", 1, remove),
    ("kill a machine", 1, kill_machine),
    ("kill a pager", 1, kill_pager),
    ("remove a snapshot", 1, remove_saved),
];

impl Population {
    /// Does something.
    pub fn act(&mut self) {
        self.acts += 1;
        let (name, _, act) = match (self.machines.len(), self.saved.len()) {
            (0, 0) => return self.boot(),
            // Too many, of the one or the other.
            (MOST_MACHINES.., _) if self.random.below(2) == 0 => self.one_of(&["remove", "commit"]),
            (_, saved) if saved > MOST_SAVED && self.random.below(2) == 0 => {
                self.one_of(&["remove a snapshot"])
            }
            (0, _) => self.one_of(&["restore", "fork of a snapshot"]),
            _ => self.one_of(&[]),
        };
        act(self);
        self.done.entry(name).or_default().0 += 1;
    }

    fn one_of(&mut self, names: &[&str]) -> (&'static str, u64, Act) {
        let fits = |act: &&(&'static str, u64, Act)| names.is_empty() || names.contains(&act.0);
        let sum = ACTS.iter().filter(fits).map(|act| act.1).sum();
        let mut at = self.random.below(sum);
        let chosen = ACTS.iter().filter(fits).find(|act| {
            let is_it = at < act.1;
            at = at.saturating_sub(act.1);
            is_it
        });
        *chosen.expect("it is below the sum")
    }

    /// How many children there is room for; 0: none.
    fn children(&mut self) -> usize {
        let room = MOST_MACHINES.saturating_sub(self.machines.len());
        room.min(1 + self.random.below(3) as usize)
    }

    fn contents(&self, id: &str) -> (Contents, bool) {
        let machine = &self.machines[id];
        (machine.contents.clone(), machine.paged)
    }

    /// The doubt about a command that was about a machine. Nobody's death excuses a command that was not cut
    /// short.
    fn doubt(&mut self, act: &'static str, done: Option<Done>, fate: Fate, id: &str) -> Doubt {
        if fate != Fate::Lives {
            self.done.entry(act).or_default().1 += 1;
        }
        match (done, fate) {
            (Some(done), Fate::Lives) => drop(done.ok()),
            (Some(done), Fate::Machine) => clear(&done),
            _ => {}
        }
        Doubt {
            vanish: (fate == Fate::Machine)
                .then(|| id.to_owned())
                .into_iter()
                .collect(),
            all_appear: fate == Fate::Lives,
            is_saved: fate == Fate::Lives,
            ..Doubt::default()
        }
    }
}

/// A command that has failed says why, and not in a panic.
fn clear(done: &Done) {
    let said =
        done.status.success() || done.stderr.contains("error") || done.stderr.contains("child");
    assert!(said && !done.stderr.contains("panicked"), "{done:?}");
}

fn named(name: &str, count: usize, what: &(Contents, bool)) -> BTreeMap<String, (Contents, bool)> {
    let each = (0..count).map(|index| (format!("{name}-{index}"), what.clone()));
    each.collect()
}

fn write(soak: &mut Population) {
    for _ in 0..2 {
        if let Some(id) = soak.any_machine() {
            soak.write(&id);
        }
    }
}

fn look(soak: &mut Population) {
    if let Some(id) = soak.any_machine() {
        soak.note(&format!("look at {id}"));
        soak.check(&id, None, false);
    }
}

fn fork(soak: &mut Population) {
    let (Some(id), count @ 1..) = (soak.any_machine(), soak.children()) else {
        return;
    };
    let (fate, name) = (soak.fate(), soak.name("kid"));
    let what = soak.contents(&id);
    let number = count.to_string();
    let mut args = vec!["fork", &id, "-n", &number, "--name", &name];
    // Then some of them may be late.
    let is_short = fate == Fate::Lives && soak.random.below(6) == 0;
    let done = match is_short {
        true => {
            args.extend(["--deadline", "700ms"]);
            soak.command(&args, fate, Some(&id)).filter(|done| {
                clear(done);
                done.status.success()
            })
        }
        false => soak.command(&args, fate, Some(&id)),
    };
    let mut doubt = soak.doubt("fork", done, fate, &id);
    doubt.all_appear &= !is_short;
    doubt.appear = named(&name, count, &what);
    soak.settle(doubt);
}

fn fork_by_engine(soak: &mut Population) {
    let (Some(id), count @ 1..) = (soak.any_machine(), soak.children()) else {
        return;
    };
    let name = soak.name("engines");
    soak.note(&format!("fork by the engine {id} -n {count} {name}"));
    let spec = ForkSpec {
        names: (0..count).map(|index| format!("{name}-{index}")).collect(),
        detached: true,
        ..ForkSpec::new(count as u32)
    };
    let entry = soak.engine().store().find(&id).expect("its record");
    let forked = soak.engine().fork(&entry.dir, &spec, None);
    for child in forked.expect("it can be forked").children {
        child.expect("it is woken").detach();
    }
    let appear = named(&name, count, &soak.contents(&id));
    soak.settle(Doubt {
        appear,
        all_appear: true,
        ..Doubt::default()
    });
}

fn fork_snapshot(soak: &mut Population) {
    let (Some(from), count @ 1..) = (soak.any_saved(), soak.children()) else {
        return;
    };
    let (fate, name, number) = (soak.fate(), soak.name("of"), count.to_string());
    let args = ["fork", "--snapshot", &from, "-n", &number, "--name", &name];
    let done = soak.command(&args, fate, None);
    let fate = if done.is_some() { Fate::Lives } else { fate };
    let mut doubt = soak.doubt("fork of a snapshot", done, fate, "");
    let saved = &soak.saved[&from];
    doubt.appear = named(&name, count, &(saved.contents.clone(), saved.paged));
    soak.settle(doubt);
}

fn fork_paused(soak: &mut Population) {
    let (Some(id), 1..) = (soak.any_machine(), soak.children()) else {
        return;
    };
    let name = soak.name("paused");
    soak.command(&["pause", &id], Fate::Lives, None)
        .map(Done::ok);
    let args = ["fork", &id, "--name", &name];
    let done = soak.command(&args, Fate::Lives, None);
    done.map(Done::ok);
    soak.command(&["resume", &id], Fate::Lives, None)
        .map(Done::ok);
    let appear = named(&name, 1, &soak.contents(&id));
    soak.settle(Doubt {
        appear,
        all_appear: true,
        ..Doubt::default()
    });
    soak.check(&id, None, false);
}

fn saved(soak: &Population, id: &str, compressed: bool) -> Saved {
    let machine = &soak.machines[id];
    Saved {
        contents: machine.contents.clone(),
        paged: machine.paged || compressed,
    }
}

fn snapshot(soak: &mut Population) {
    let Some(id) = soak.any_machine() else { return };
    let (fate, name) = (soak.fate(), soak.name("point"));
    let mut args = vec!["snapshot", &id, &name];
    let is_compressed = soak.random.below(3) == 0;
    args.extend(is_compressed.then_some("--compress"));
    let done = soak.command(&args, fate, Some(&id));
    let mut doubt = soak.doubt("snapshot", done, fate, &id);
    doubt.saved = Some((name, saved(soak, &id, is_compressed)));
    soak.settle(doubt);
    if fate == Fate::Command {
        // It goes on, although nobody said so to it.
        soak.check(&id, None, false);
    }
}

fn restore(soak: &mut Population) {
    let (Some(from), 1..) = (soak.any_saved(), soak.children()) else {
        return;
    };
    let (fate, name) = (soak.fate(), soak.name("restored"));
    let args = ["restore", &from, "--name", &name];
    let done = soak.command(&args, fate, None);
    let fate = if done.is_some() { Fate::Lives } else { fate };
    let mut doubt = soak.doubt("restore", done, fate, "");
    let saved = &soak.saved[&from];
    doubt.appear = [(name, (saved.contents.clone(), saved.paged))].into();
    soak.settle(doubt);
}

fn rollback(soak: &mut Population) {
    let (Some(id), Some(to)) = (soak.any_machine(), soak.any_saved()) else {
        return;
    };
    let fate = soak.fate();
    let done = soak.command(&["rollback", &id, &to], fate, Some(&id));
    let mut doubt = soak.doubt("rollback", done, fate, &id);
    let saved = &soak.saved[&to];
    let instead = (saved.contents.clone(), saved.paged);
    if fate == Fate::Lives {
        let machine = soak.machines.get_mut(&id).expect("it is known");
        (machine.contents, machine.paged) = instead;
        soak.settle(doubt);
        soak.check(&id, None, false);
    } else {
        // What may have a pager may die with one.
        doubt.instead = [(id, instead)].into();
        soak.settle(doubt);
    }
}

fn commit(soak: &mut Population) {
    let children: Vec<_> = soak
        .machines
        .iter()
        .filter(|(_, machine)| machine.parent.is_some())
        .map(|(id, _)| id.clone())
        .collect();
    if children.is_empty() {
        return;
    }
    let id = &children[soak.random.below(children.len() as u64) as usize];
    let fate = match soak.fate() {
        Fate::Command => Fate::Command,
        _ => Fate::Lives,
    };
    let gone = discarded(&soak.machines, id);
    let done = soak.command(&["commit", id], fate, Some(id));
    let was_cut = done.is_none();
    let mut doubt = soak.doubt("commit", done, fate, id);
    doubt.vanish = gone.into_iter().collect();
    doubt.all_vanish = !was_cut;
    // The next command does the rest.
    doubt.all_or_none = was_cut;
    soak.settle(doubt);
    soak.check(id, None, false);
}

fn suspend(soak: &mut Population) {
    let Some(id) = soak.any_machine() else { return };
    let (fate, name) = (soak.fate(), soak.name("asleep"));
    let done = soak.command(&["suspend", &id, &name], fate, Some(&id));
    let mut doubt = soak.doubt("suspend", done, fate, &id);
    doubt.saved = Some((name.clone(), saved(soak, &id, false)));
    doubt.vanish = [id.clone()].into();
    doubt.all_vanish = fate == Fate::Lives;
    soak.settle(doubt);
    assert!(
        soak.saved.contains_key(&name) || soak.machines.contains_key(&id) || fate == Fate::Machine,
        "{id} has ended, and is not kept"
    );
}

/// Two commands about one machine, neither of which changes what it holds.
fn two_at_once(soak: &mut Population) {
    let Some(id) = soak.any_machine() else { return };
    let mut doubt = Doubt {
        all_appear: true,
        is_saved: true,
        ..Doubt::default()
    };
    let (kid, point) = (soak.name("side"), soak.name("meanwhile"));
    let room = soak.children() > 0;
    let fork = ["fork", id.as_str(), "--name", &kid];
    let snapshot = ["snapshot", id.as_str(), &point];
    let code = [
        "code",
        id.as_str(),
        "-x",
        "other",
        "-l",
        "bash",
        "-c",
        "sync",
    ];
    let pairs: [&[&str]; 2] = match (room, soak.random.below(3)) {
        (true, 0) => [&fork, &snapshot],
        (true, 1) => [&fork, &code],
        _ => [&snapshot, &code],
    };
    for args in pairs {
        match args[0] {
            "fork" => doubt.appear = named(&kid, 1, &soak.contents(&id)),
            "snapshot" => doubt.saved = Some((point.clone(), saved(soak, &id, false))),
            _ => {}
        }
    }
    soak.note(&format!(
        "at once: {}; {}",
        pairs[0].join(" "),
        pairs[1].join(" ")
    ));
    let started = pairs.map(|args| soak.ratoon.command(args).spawn().expect("ratoon starts"));
    for child in started {
        finish(child).ok();
    }
    soak.settle(doubt);
}

fn remove(soak: &mut Population) {
    let Some(id) = soak.any_machine() else { return };
    let fate = match soak.fate() {
        Fate::Command => Fate::Command,
        _ => Fate::Lives,
    };
    let done = soak.command(&["rm", "-f", &id], fate, None);
    let was_cut = done.is_none();
    let mut doubt = soak.doubt("remove", done, fate, &id);
    doubt.vanish = [id].into();
    doubt.all_vanish = !was_cut;
    soak.settle(doubt);
}

fn kill_machine(soak: &mut Population) {
    let Some(id) = soak.any_machine() else { return };
    soak.note(&format!("kill {id}"));
    if let Some(pid) = soak.pid(&id) {
        kill(pid);
    }
    soak.ratoon.run(["rm", "-f", &id]).ok();
    let vanish = [id].into();
    soak.settle(Doubt {
        vanish,
        all_vanish: true,
        ..Doubt::default()
    });
}

/// Whoever has memory from it ends; the others do not hear of it.
fn kill_pager(soak: &mut Population) {
    let found = pagers(&soak.ratoon);
    let Some(pid) = found.first() else { return };
    soak.note(&format!("kill pager {pid}"));
    kill(*pid);
    let paged = soak.machines.iter().filter(|(_, machine)| machine.paged);
    let vanish: BTreeSet<_> = paged.map(|(id, _)| id.clone()).collect();
    for id in &vanish {
        soak.check(id, None, true);
    }
    soak.settle(Doubt {
        vanish,
        ..Doubt::default()
    });
}

fn remove_saved(soak: &mut Population) {
    let Some(name) = soak.any_saved() else { return };
    let args = ["snapshots", "rm", &name];
    let done = soak.command(&args, Fate::Lives, None).expect("it ends");
    // What another one needs, or a machine, stays.
    clear(&done);
    soak.settle(Doubt {
        removed: Some(name),
        ..Doubt::default()
    });
}
