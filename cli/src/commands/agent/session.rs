//! The agent's process in a guest: orders in, events out, whoever is attached.
//!
//! ```text
//!   start, attach --> events, one by one --> ended, held, taken over, or left: the process goes on without us
//! ```
//!
//! Leaving is closing the connection: the end of our input would be the end of the process's.

use std::cell::{Cell, RefCell};
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use ratoon_client::RuntimeError;
use ratoon_client::blocking::{CallIo, Client, Controller};
use ratoon_protocol::{
    AgentEvent, AttachParams, Call, ErrorCode, Event, ExecParams, ExitReport, Task,
};
use serde::Serialize;

/// Where the program is in the guest.
pub const PROGRAM: &str = "/run/ratoon-agent";
/// What its process is called in lists.
const TAG: &str = "ratoon-agent";
/// A longer line is no event, in bytes.
const MAX_LINE: usize = 8 << 20;
/// So much of its errors is kept, in bytes.
const ERRORS_KEPT: usize = 4096;
/// A longer order is written beside: a pipe holds 64 KiB.
const SHORT: usize = 16 << 10;

/// Its input. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Orders(Arc<Mutex<PipeWriter>>);

impl Orders {
    /// Says something to it; it is sent when somebody is attached.
    pub fn say(&self, what: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(what)?;
        line.push(b'\n');
        let pipe = Arc::clone(&self.0);
        if line.len() <= SHORT {
            let mut pipe = pipe.lock().unwrap_or_else(PoisonError::into_inner);
            return pipe.write_all(&line);
        }
        // It takes the lock before anybody else can: so the order stays.
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name("orders".into())
            .spawn(move || {
                let mut pipe = pipe.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = tell.send(());
                // Who has gone needs no orders.
                let _ = pipe.write_all(&line);
            })?;
        let _ = told.recv();
        Ok(())
    }
}

/// How we left it.
#[derive(Debug)]
pub enum Left {
    /// It said [`AgentEvent::Ended`] and has ended.
    Ended,
    /// It ended without: its last errors, in its own words.
    Died(String),
    /// The caller left, or was told to by [`Controller::cancel`].
    Running,
    /// Another command has it now.
    TakenOver,
}

/// The process.
#[derive(Debug)]
pub struct Agent {
    /// Its input.
    pub orders: Orders,
    /// Its id in the guest.
    pub pid: Option<i32>,
    /// What we have of its outputs, in bytes.
    have: [u64; 2],
    input: PipeReader,
}

impl Agent {
    /// None yet: one is started or attached to.
    pub fn new() -> io::Result<Self> {
        let (input, orders) = io::pipe()?;
        Ok(Self {
            orders: Orders(Arc::new(Mutex::new(orders))),
            pid: None,
            have: [0; 2],
            input,
        })
    }

    /// The same process in a child of the machine, which has said what we have heard.
    pub fn in_child(&self) -> io::Result<Self> {
        Ok(Self {
            pid: self.pid,
            have: self.have,
            ..Self::new()?
        })
    }

    /// That of a run that somebody else has started.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self {
            pid: Some(pid),
            ..Self::new()?
        })
    }

    /// Starts it with a task, and hears it until it ends or `heard` wants no more (`false`).
    pub fn start(
        &mut self,
        client: &mut Client,
        task: &Task,
        heard: &mut dyn FnMut(Heard<'_>) -> bool,
    ) -> Result<Left, RuntimeError> {
        self.orders.say(task).map_err(RuntimeError::Input)?;
        let call = Call::Exec(Box::new(ExecParams {
            argv: vec![PROGRAM.into(), "loop".into()],
            cwd: Some("/".into()),
            stdin: true,
            keep: true,
            tag: Some(TAG.into()),
            ..ExecParams::default()
        }));
        self.hear(client, &call, heard)
    }

    /// Takes it over, and hears it as [`Agent::start`] does.
    pub fn attach(
        &mut self,
        client: &mut Client,
        heard: &mut dyn FnMut(Heard<'_>) -> bool,
    ) -> Result<Left, RuntimeError> {
        let call = Call::Attach(AttachParams {
            pid: self.pid.unwrap_or_default(),
            have: self.have,
        });
        self.hear(client, &call, heard)
    }

    fn hear(
        &mut self,
        client: &mut Client,
        call: &Call,
        heard: &mut dyn FnMut(Heard<'_>) -> bool,
    ) -> Result<Left, RuntimeError> {
        let mut errors = Errors::default();
        let has_ended = Cell::new(false);
        let pid = Cell::new(self.pid);
        let lines = RefCell::new(Lines {
            have: self.have,
            ..Lines::default()
        });
        let heard = RefCell::new(heard);
        let controller = client.controller();
        let mut out = Out {
            lines: &lines,
            heard: &heard,
            has_ended: &has_ended,
            controller: &controller,
        };
        let mut events = |event| match event {
            Event::Started { pid: started } => {
                pid.set(Some(started));
                (heard.borrow_mut())(Heard::Pid(started));
            }
            Event::Attached { from, .. } => lines.borrow_mut().go_on(from),
            _ => {}
        };
        let mut io = CallIo {
            stdin: Some(self.input.as_fd()),
            stdout: &mut out,
            stderr: &mut errors,
            data: &mut io::sink(),
            events: &mut events,
            ended: &mut |_| {},
        };
        let result: Result<ExitReport, _> = client.run(call, &mut io);
        self.pid = pid.get();
        let [out, err] = lines.borrow().have;
        self.have = [out, err + errors.have];
        match result {
            Ok(_) if has_ended.get() => Ok(Left::Ended),
            Ok(report) => {
                let words = errors.words();
                let code = report.status.shell_code();
                Ok(Left::Died(format!(
                    "it ended with {code}; its last words: {words}"
                )))
            }
            Err(RuntimeError::Cancelled) => Ok(Left::Running),
            Err(RuntimeError::Call(error)) if error.code == ErrorCode::TakenOver => {
                Ok(Left::TakenOver)
            }
            Err(error) => Err(error),
        }
    }
}

/// What is heard.
#[derive(Debug)]
pub enum Heard<'a> {
    /// The process runs.
    Pid(i32),
    /// It says this.
    Event(&'a AgentEvent),
}

/// Its output, in lines.
#[derive(Debug, Default)]
struct Lines {
    held: Vec<u8>,
    have: [u64; 2],
    /// The rest of a line that is too long.
    skip: bool,
}

impl Lines {
    /// An attached process's output goes on there.
    fn go_on(&mut self, from: [u64; 2]) {
        if from[0] != self.have[0] {
            // Perhaps in the middle of a line, whose rest is no event.
            self.held.clear();
            self.skip = false;
        }
        self.have = from;
    }

    fn take(&mut self, bytes: &[u8], mut event: impl FnMut(AgentEvent)) {
        self.have[0] += bytes.len() as u64;
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let is_end = piece.last() == Some(&b'\n');
            if !self.skip {
                self.held.extend_from_slice(piece);
                self.skip = self.held.len() > MAX_LINE;
            }
            if is_end {
                let line = std::mem::take(&mut self.held);
                // One of a later version says nothing to us.
                if !std::mem::take(&mut self.skip)
                    && let Ok(said) = serde_json::from_slice(&line)
                {
                    event(said);
                }
            } else if self.skip {
                self.held.clear();
            }
        }
    }
}

struct Out<'a, 'h> {
    lines: &'a RefCell<Lines>,
    heard: &'a RefCell<&'h mut dyn FnMut(Heard<'_>) -> bool>,
    has_ended: &'a Cell<bool>,
    controller: &'a Controller,
}

impl Write for Out<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lines.borrow_mut().take(bytes, |event| {
            if matches!(event, AgentEvent::Ended { .. }) {
                self.has_ended.set(true);
            }
            if !(self.heard.borrow_mut())(Heard::Event(&event)) {
                self.controller.cancel();
            }
        });
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The end of its errors.
#[derive(Debug, Default)]
struct Errors {
    kept: Vec<u8>,
    have: u64,
}

impl Errors {
    fn words(&self) -> String {
        let text = String::from_utf8_lossy(&self.kept);
        match super::show::clean(text.trim()) {
            words if words.is_empty() => "none".into(),
            words => words,
        }
    }
}

impl Write for Errors {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.have += bytes.len() as u64;
        self.kept.extend_from_slice(bytes);
        let surplus = self.kept.len().saturating_sub(ERRORS_KEPT);
        self.kept.drain(..surplus);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(lines: &mut Lines, bytes: &[u8]) -> Vec<u32> {
        let mut found = Vec::new();
        lines.take(bytes, |event| {
            if let AgentEvent::Step { step } = event {
                found.push(step);
            }
        });
        found
    }

    const LINE: &[u8] = b"{\"event\":\"step\",\"step\":1}\n";

    #[test]
    fn events_come_out_of_bytes_in_any_pieces() {
        let mut lines = Lines::default();
        let found: Vec<u32> = LINE
            .chunks(3)
            .flat_map(|piece| steps(&mut lines, piece))
            .collect();
        assert_eq!((found, lines.have[0]), (vec![1], LINE.len() as u64));
        assert_eq!(steps(&mut lines, &[LINE, LINE].concat()), [1, 1]);
        assert_eq!(
            steps(&mut lines, b"{\"event\":\"later\"}\nnonsense\n"),
            [0u32; 0]
        );
        assert_eq!(steps(&mut lines, LINE), [1]);
    }

    #[test]
    fn what_goes_on_in_the_middle_of_a_line_begins_with_the_next() {
        let mut lines = Lines::default();
        lines.go_on([7, 0]);
        assert_eq!(steps(&mut lines, &[&LINE[7..], LINE].concat()), [1]);
        // One that goes on where we were loses nothing.
        assert_eq!(steps(&mut lines, &LINE[..9]), [0u32; 0]);
        let have = lines.have;
        lines.go_on(have);
        assert_eq!(steps(&mut lines, &LINE[9..]), [1]);
    }

    #[test]
    fn a_line_without_end_fills_no_memory() {
        let mut lines = Lines::default();
        for _ in 0..10 {
            assert_eq!(steps(&mut lines, &vec![b'x'; 1 << 20]), [0u32; 0]);
        }
        assert!(lines.held.is_empty());
        assert_eq!(steps(&mut lines, b"\n"), [0u32; 0]);
        assert_eq!(steps(&mut lines, LINE), [1]);
    }
}
