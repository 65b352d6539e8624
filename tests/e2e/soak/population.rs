//! The machines and snapshots of the soak, and what is known of them after each act.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use ratoon_engine::Engine;
use ratoon_engine::vm::freeze::machine_id;
use ratoon_engine::vm::life::Status;
use ratoon_tests::{Done, Random, Ratoon, finish};
use rustix::process::{Pid, Signal, kill_process};

use super::left::Counts;
use super::model::{Contents, Machine, Machines, Saved, Write};

const WITNESS: &str = include_str!("witness_in_machine.py");
/// Machines at once.
pub const MOST_MACHINES: usize = 5;
/// Snapshots at once, but for those that others need.
pub const MOST_SAVED: usize = 5;
/// How many of the last acts a failure tells.
const TOLD: usize = 40;
/// How long a machine that is starting or ending may take to be settled.
const PATIENCE: Duration = Duration::from_secs(120);

/// Who is killed in the middle of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Nobody.
    Lives,
    /// The command itself.
    Command,
    /// The machine that it is about.
    Machine,
}

/// What may have come of an act; what is not in it must not have changed.
#[derive(Debug, Default)]
pub struct Doubt {
    /// Machines of these names with these contents, and whether they have a pager.
    pub appear: BTreeMap<String, (Contents, bool)>,
    /// All of them are there.
    pub all_appear: bool,
    /// Machines that may have gone, by their ids.
    pub vanish: BTreeSet<String>,
    /// All of them have gone.
    pub all_vanish: bool,
    /// Or none of them.
    pub all_or_none: bool,
    /// What machines may hold instead.
    pub instead: BTreeMap<String, (Contents, bool)>,
    /// A snapshot of this name.
    pub saved: Option<(String, Saved)>,
    /// It is there.
    pub is_saved: bool,
    /// A snapshot that may have gone.
    pub removed: Option<String>,
}

/// What the records say of a machine.
#[derive(Debug)]
pub struct Seen {
    name: String,
    status: Status,
    causes: Vec<String>,
    pub pid: Option<i32>,
    parent: Option<(Option<String>, String)>,
}

pub struct Population {
    pub ratoon: Ratoon,
    /// An engine that lives as long as the soak; taken at its end.
    pub engine: Option<Engine>,
    pub random: Random,
    pub machines: Machines,
    pub saved: BTreeMap<String, Saved>,
    pub before: Counts,
    /// With an engine and nothing else.
    pub at_rest: Counts,
    pub acts: u64,
    /// How often each was done, and how many of them were cut short.
    pub done: BTreeMap<&'static str, (u32, u32)>,
    numbers: u64,
    checks: u64,
    log: VecDeque<String>,
    seed: u64,
    is_over: bool,
}

impl Drop for Population {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        eprintln!("soak: RATOON_SOAK_SEED={} failed after:", self.seed);
        for line in &self.log {
            eprintln!("  {line}");
        }
        self.tell();
    }
}

impl Population {
    /// One machine with a witness.
    pub fn begin(seed: u64) -> Self {
        let ratoon = Ratoon::new();
        // Opens what random numbers come from, once for all.
        machine_id().expect("random numbers");
        // And what the first runtime of tokio opens for signals, where a crate of the workspace wants them.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        drop(runtime.expect("a runtime"));
        let before = Counts::now(&ratoon);
        let shells = [((1, 256), 1)].into();
        let engine = ratoon.engine().with_shells(shells);
        let engine = engine.expect("an engine with a shell");
        let at_rest = Counts::now(&ratoon);
        let mut population = Self {
            ratoon,
            engine: Some(engine),
            random: Random::new(seed),
            machines: Machines::new(),
            saved: BTreeMap::new(),
            before,
            at_rest,
            acts: 0,
            done: BTreeMap::new(),
            numbers: 1,
            checks: 0,
            log: VecDeque::new(),
            seed,
            is_over: false,
        };
        population.boot();
        population
    }

    pub fn engine(&self) -> &Engine {
        self.engine.as_ref().expect("it is taken at the end")
    }

    /// A machine that comes from nobody.
    pub fn boot(&mut self) {
        let name = self.name("root");
        self.note(&format!("run {name}"));
        let args = ["run", "-d", "--name", &name, "--memory", "256M"];
        let id = self.ratoon.run(args).ok().stdout.trim().to_owned();
        self.ratoon.run(["code", &id, "-c", WITNESS]).ok();
        let machine = Machine {
            name,
            contents: Contents::new(),
            parent: None,
            paged: false,
        };
        self.machines.insert(id, machine);
        self.settle(Doubt::default());
    }

    /// A name that nothing had.
    pub fn name(&mut self, kind: &str) -> String {
        format!("{kind}-{}", self.number(1))
    }

    fn number(&mut self, count: u64) -> u64 {
        self.numbers += count;
        self.numbers - count
    }

    /// What there is, and the last words of each machine.
    fn tell(&self) {
        let shown = self.ratoon.run(["ps", "-a", "--json"]);
        eprintln!("machines: {}{}", shown.stdout, shown.stderr);
        let folders = std::fs::read_dir(self.ratoon.vms_dir())
            .into_iter()
            .flatten();
        for folder in folders.flatten().map(|entry| entry.path()) {
            eprintln!("{}:", folder.display());
            for name in ["vmm.log", "exit.json"] {
                let text = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
                let lines: Vec<_> = text.lines().collect();
                for line in &lines[lines.len().saturating_sub(TOLD)..] {
                    eprintln!("  {name}: {line}");
                }
            }
        }
    }

    pub fn note(&mut self, line: &str) {
        self.log.push_back(format!("{}: {line}", self.acts));
        if std::env::var_os("RATOON_SOAK_TELL").is_some() {
            eprintln!("{}: {line}", self.acts);
        }
        if self.log.len() > TOLD {
            self.log.pop_front();
        }
    }

    /// One of the machines, if there is any.
    pub fn any_machine(&mut self) -> Option<String> {
        let count = self.machines.len() as u64;
        let index = (count > 0).then(|| self.random.below(count) as usize)?;
        self.machines.keys().nth(index).cloned()
    }

    /// One of the snapshots, if there is any.
    pub fn any_saved(&mut self) -> Option<String> {
        let count = self.saved.len() as u64;
        let index = (count > 0).then(|| self.random.below(count) as usize)?;
        self.saved.keys().nth(index).cloned()
    }

    /// Mostly nobody; else somebody at any time of the command.
    pub fn fate(&mut self) -> Fate {
        match self.random.below(10) {
            0..=1 => Fate::Command,
            2 => Fate::Machine,
            _ => Fate::Lives,
        }
    }

    /// Runs `ratoon` with these words about this machine; `None`: it was killed.
    pub fn command(&mut self, args: &[&str], fate: Fate, about: Option<&str>) -> Option<Done> {
        let about = about.and_then(|id| self.pid(id));
        let mut child = self.ratoon.command(args).spawn().expect("ratoon starts");
        let after = Duration::from_millis(self.random.below(1500));
        let line = args.join(" ");
        match (fate, about) {
            (Fate::Command, _) => {
                self.note(&format!("{line}, killed after {after:?}"));
                std::thread::sleep(after);
                if child.try_wait().expect("it is our child").is_none() {
                    let _ = child.kill();
                    let _ = child.wait();
                    return None;
                }
            }
            (Fate::Machine, Some(pid)) => {
                self.note(&format!("{line}, its machine killed after {after:?}"));
                std::thread::sleep(after);
                kill(pid);
            }
            _ => self.note(&line),
        }
        Some(finish(child))
    }

    pub fn pid(&self, id: &str) -> Option<i32> {
        self.look().remove(id).and_then(|seen| seen.pid)
    }

    /// All machines as the records have them.
    pub fn look(&self) -> BTreeMap<String, Seen> {
        let vms = self.engine().vms().expect("records");
        let seen = vms.into_iter().filter_map(|info| {
            let record = self.engine().store().find(&info.id).ok()?.record.ok()?;
            let parent = record.parent.clone();
            let seen = Seen {
                name: record.name.clone().unwrap_or_default(),
                status: info.status,
                causes: info.causes,
                pid: info.pid,
                parent: parent.map(|parent| (parent.vm, parent.generation)),
            };
            Some((info.id, seen))
        });
        seen.collect()
    }

    /// After an act: what is there is what was there, but for what is in doubt; and what is in doubt holds what
    /// it may hold.
    pub fn settle(&mut self, doubt: Doubt) {
        // Whoever comes next sweeps after the dead.
        self.ratoon.run(["ps", "-a"]).ok();
        let end = Instant::now() + PATIENCE;
        let mut seen = self.look();
        while seen.values().any(|it| it.status == Status::Starting) {
            assert!(Instant::now() < end, "it starts for ever: {seen:?}");
            std::thread::sleep(Duration::from_millis(20));
            self.ratoon.run(["ps", "-a"]).ok();
            seen = self.look();
        }
        let mut unsure: BTreeSet<String> = doubt.instead.keys().cloned().collect();
        for (id, now) in &seen {
            if self.machines.contains_key(id) {
                continue;
            }
            let Some((contents, paged)) = doubt.appear.get(&now.name) else {
                panic!("{id} is there, and nobody made it: {now:?}");
            };
            let machine = Machine {
                name: now.name.clone(),
                contents: contents.clone(),
                parent: None,
                paged: *paged,
            };
            self.machines.insert(id.clone(), machine);
            unsure.insert(id.clone());
        }
        let made: BTreeSet<_> = seen.values().map(|it| it.name.as_str()).collect();
        let missing = doubt.appear.keys().find(|it| !made.contains(it.as_str()));
        assert!(!doubt.all_appear || missing.is_none(), "no {missing:?}");
        for id in self.machines.keys().cloned().collect::<Vec<_>>() {
            // A child may be there for a moment that its killed forker has not handed out.
            let is_new = unsure.contains(&id) && !doubt.instead.contains_key(&id);
            let may_go = doubt.vanish.contains(&id) || (is_new && !doubt.all_appear);
            match seen.get(&id) {
                Some(now) if now.status.is_live() => {
                    assert!(
                        !(doubt.all_vanish && doubt.vanish.contains(&id)),
                        "{id} is still there"
                    );
                    let machine = self.machines.get_mut(&id).expect("it is known");
                    machine.name.clone_from(&now.name);
                    machine.parent.clone_from(&now.parent);
                }
                gone => {
                    let causes = gone.map(|it| &it.causes);
                    assert!(may_go, "{id} has gone: {gone:?}, {causes:?}");
                    if gone.is_some() {
                        self.ratoon.run(["rm", "-f", &id]).ok();
                    }
                    self.machines.remove(&id);
                    unsure.remove(&id);
                }
            }
        }
        let left: BTreeSet<_> = self.machines.keys().cloned().collect();
        let left: BTreeSet<_> = doubt.vanish.intersection(&left).cloned().collect();
        let is_half = !left.is_empty() && left.len() < doubt.vanish.len();
        assert!(!(doubt.all_or_none && is_half), "only {left:?} are left");
        // Whoever was killed may have killed it: then it is about to go.
        unsure.extend(left);
        self.settle_saved(doubt.saved, doubt.is_saved, doubt.removed);
        for id in unsure {
            let instead = doubt.instead.get(&id);
            let may_go = doubt.vanish.contains(&id) || !doubt.all_appear && instead.is_none();
            self.check(&id, instead, may_go);
        }
    }

    fn settle_saved(&mut self, new: Option<(String, Saved)>, is_there: bool, gone: Option<String>) {
        let store = self.engine().snapshots().expect("a store");
        let listing = store.list().expect("it can be read");
        assert!(listing.damaged.is_empty(), "{:?}", listing.damaged);
        let mut names = BTreeSet::new();
        for snapshot in &listing.snapshots {
            assert!(!snapshot.names.is_empty(), "{} has no name", snapshot.id);
            names.extend(snapshot.names.iter().cloned());
        }
        if let Some((name, saved)) = new {
            match names.contains(&name) {
                true => drop(self.saved.insert(name, saved)),
                false => assert!(!is_there, "no snapshot {name}"),
            }
        }
        if let Some(name) = gone.filter(|name| !names.contains(name)) {
            self.saved.remove(&name);
        }
        let known: BTreeSet<_> = self.saved.keys().cloned().collect();
        assert_eq!(names, known, "snapshots");
    }

    /// The witness of a machine says what the model says, or what may be instead. One that may have gone says
    /// nothing.
    pub fn check(&mut self, id: &str, instead: Option<&(Contents, bool)>, may_go: bool) {
        let cold = if self.random.below(3) == 0 {
            "True"
        } else {
            "False"
        };
        let look = format!("look({cold})");
        let said = self.ratoon.run(["code", id, "-c", &look]);
        self.checks += 1;
        if !said.status.success() {
            let end = Instant::now() + PATIENCE;
            // It may be about to go.
            while may_go && self.look().get(id).is_some_and(|it| it.status.is_live()) {
                assert!(
                    Instant::now() < end,
                    "{id} neither answers nor ends: {said:?}"
                );
                std::thread::sleep(Duration::from_millis(50));
            }
            assert!(may_go, "{id} does not answer: {said:?}; {:?}", self.look());
            self.ratoon.run(["rm", "-f", id]);
            self.machines.remove(id);
            return;
        }
        let machine = self.machines.get_mut(id).expect("it is known");
        let Some(difference) = machine.contents.difference(&said.stdout) else {
            // If both hold the same nobody can tell which of them it is.
            machine.paged |= instead.is_some_and(|(contents, paged)| {
                *paged && contents.difference(&said.stdout).is_none()
            });
            return;
        };
        let Some((contents, paged)) = instead else {
            panic!("{id} ({}): {difference}", machine.name);
        };
        if let Some(other) = contents.difference(&said.stdout) {
            panic!("{id} ({}): {difference}; {other}", machine.name);
        }
        machine.contents.clone_from(contents);
        machine.paged = *paged;
    }

    /// A witness writes.
    pub fn write(&mut self, id: &str) {
        let number = self.number(Write::MOST);
        let write = Write::any(&mut self.random, number);
        let call = write.call();
        self.note(&format!("{id}: {call}"));
        self.ratoon.run(["code", id, "-c", &call]).ok();
        let machine = self.machines.get_mut(id).expect("it is known");
        machine.contents.put(&write);
    }

    /// Ends all, and counts once more.
    pub fn end(mut self) -> String {
        let all: Vec<_> = self.machines.keys().cloned().collect();
        for id in &all {
            self.check(id, None, false);
        }
        self.nothing_is_left_over();
        for id in &all {
            self.ratoon.run(["rm", "-f", id]).ok();
        }
        self.machines.clear();
        // What another one needs goes after that.
        while let Some(count) = Some(self.saved.len()).filter(|count| *count > 0) {
            for name in self.saved.keys().cloned().collect::<Vec<_>>() {
                if self.ratoon.run(["snapshots", "rm", &name]).status.success() {
                    self.saved.remove(&name);
                }
            }
            assert!(self.saved.len() < count, "they cannot be removed");
        }
        // The engine asks how those of its own have ended.
        assert!(self.look().is_empty());
        self.engine = None;
        self.ratoon.nothing_is_left();
        self.before.are_those_of(&self.ratoon);
        self.is_over = true;
        let acts = self.done.iter();
        let acts: Vec<_> = acts
            .map(|(act, (all, cut))| format!("{act} {all} ({cut} cut short)"))
            .collect();
        format!("{} checks; {}", self.checks, acts.join(", "))
    }
}

/// As a crash would.
pub fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
