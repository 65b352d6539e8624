//! vCPU threads: one a vCPU, told by a shared target what to do.
//!
//! ```text
//!           target = Run             target = Hold              target = End
//!  (start) -----------> KVM_RUN loop ------------> waits ... ------------> thread ends
//!                            ^                       |
//!                            +------ target = Run ---+
//! ```
//!
//! Whoever changes the target holds its lock, then sets each vCPU's `immediate_exit` and sends its
//! thread a signal. A thread clears `immediate_exit` only with the lock held and the target at
//! [`Target::Run`], so no kick is lost: either KVM_RUN sees the flag, or the signal ends KVM_RUN.
//!
//! While they hold, all threads can be sent on a [visit](Vcpus::visit) of their vCPUs, side by side.

mod exit;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use ratoon_vmm_api::{HostClass, Outcome};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::clock::monotonic_ns;
use crate::ending::Ending;
use crate::host::slice;
pub use exit::VcpuError;

/// What the vCPU threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Stay between two instructions.
    Hold,
    /// Run guest code.
    Run,
    /// Return from the thread.
    End,
}

/// What each thread does with its vCPU while it holds.
type Visit = Arc<dyn Fn(usize, &VcpuFd) + Send + Sync>;

struct State {
    target: Target,
    /// The visit under way, and how many there have been.
    visit: Option<Visit>,
    visits: u64,
    /// How many threads have done it.
    visited: usize,
    /// How many threads are not inside KVM_RUN.
    holding: usize,
    first_run_ns: u64,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A vCPU thread that panicked has nothing half-changed in here.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The `immediate_exit` byte of a vCPU's shared page.
struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte is only ever accessed atomically by us; the kernel reads it.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(vcpu: &mut VcpuFd) -> Self {
        let byte: *const u8 = &raw const vcpu.get_kvm_run().immediate_exit;
        Self(byte.cast())
    }

    fn set(&self, value: u8) {
        // SAFETY: the page stays mapped as long as the `VcpuFd`, which its thread gives back only
        // when it is joined, in `Vcpus::end`, after which `set` is not called.
        unsafe { (*self.0).store(value, Ordering::SeqCst) }
    }
}

struct Thread {
    immediate_exit: Arc<ImmediateExit>,
    handle: JoinHandle<VcpuFd>,
}

/// All vCPUs of a VM, held until [`Vcpus::run`].
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    /// Kept so that the shared pages stay mapped until the process ends.
    ended: Vec<VcpuFd>,
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Its arrival is all that is wanted: it ends KVM_RUN with EINTR.
}

impl Vcpus {
    /// Starts a thread for each vCPU, holding.
    ///
    /// # Errors
    /// When the system has no more threads, or the signal cannot be taken.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        class: HostClass,
        bus: &Arc<Bus>,
        ending: &Arc<Ending>,
    ) -> std::io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                target: Target::Hold,
                visit: None,
                visits: 0,
                visited: 0,
                holding: vcpus.len(),
                first_run_ns: 0,
            }),
            changed: Condvar::new(),
        });
        let mut started = Self {
            shared: shared.clone(),
            threads: Vec::new(),
            ended: Vec::new(),
        };
        for (index, mut vcpu) in vcpus.into_iter().enumerate() {
            let immediate_exit = Arc::new(ImmediateExit::of(&mut vcpu));
            let worker = Worker {
                index,
                class,
                visits: 0,
                vcpu,
                immediate_exit: immediate_exit.clone(),
                shared: shared.clone(),
                bus: bus.clone(),
                ending: ending.clone(),
            };
            let spawned = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(256 * 1024)
                .spawn(move || worker.work());
            match spawned {
                Ok(handle) => started.threads.push(Thread {
                    immediate_exit,
                    handle,
                }),
                Err(error) => {
                    started.end();
                    return Err(error);
                }
            }
        }
        Ok(started)
    }

    /// Lets all vCPUs run.
    pub fn run(&self) {
        self.aim(Target::Run);
    }

    /// Holds all vCPUs between two instructions; returns when all are.
    pub fn hold(&self) {
        self.aim(Target::Hold);
        let mut state = self.shared.lock();
        while state.holding < self.threads.len() && state.target == Target::Hold {
            state = self.shared.wait(state);
        }
    }

    /// Calls `visit` for each vCPU, on its own thread, and returns when all have come back. They must
    /// be holding.
    pub fn visit(&self, visit: impl Fn(usize, &VcpuFd) + Send + Sync + 'static) {
        let mut state = self.shared.lock();
        state.visit = Some(Arc::new(visit));
        state.visits += 1;
        state.visited = 0;
        self.shared.changed.notify_all();
        while state.visited < self.threads.len() && state.target == Target::Hold {
            state = self.shared.wait(state);
        }
        state.visit = None;
    }

    /// When the first guest instruction ran (CLOCK_MONOTONIC, nanoseconds), 0 before.
    pub fn first_run_ns(&self) -> u64 {
        self.shared.lock().first_run_ns
    }

    /// Ends all threads and waits for them.
    pub fn end(&mut self) {
        self.aim(Target::End);
        for thread in self.threads.drain(..) {
            if let Ok(vcpu) = thread.handle.join() {
                self.ended.push(vcpu);
            }
        }
    }

    fn aim(&self, target: Target) {
        let mut state = self.shared.lock();
        state.target = target;
        if target != Target::Run {
            for thread in &self.threads {
                thread.immediate_exit.set(1);
            }
        }
        drop(state);
        self.shared.changed.notify_all();
        if target != Target::Run {
            for thread in &self.threads {
                // A thread that has already ended cannot be told: nothing to do.
                let _ = thread.handle.kill(SIGRTMIN());
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.end();
    }
}

struct Worker {
    index: usize,
    class: HostClass,
    /// How many visits it has seen.
    visits: u64,
    vcpu: VcpuFd,
    immediate_exit: Arc<ImmediateExit>,
    shared: Arc<Shared>,
    bus: Arc<Bus>,
    ending: Arc<Ending>,
}

impl Worker {
    fn work(mut self) -> VcpuFd {
        if self.class == HostClass::Emulated
            && let Err(error) = slice::lengthen()
        {
            tracing::debug!(%error, "the vCPU keeps the scheduler's usual slice");
        }
        while self.wait_for_run() {
            // It stood still: its kernel must not take the gap for a hang of its own. A guest without
            // kvm-clock does not take this.
            let _ = self.vcpu.kvmclock_ctrl();
            let result = self.run_until_kicked();
            self.shared.lock().holding += 1;
            self.shared.changed.notify_all();
            if let Err(error) = result {
                self.ending.end(Outcome::from(error));
                self.wait_for_end();
                break;
            }
        }
        self.vcpu
    }

    /// Waits while the target is [`Target::Hold`]; `false` when the thread is to end.
    fn wait_for_run(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut state = shared.lock();
        loop {
            match state.target {
                Target::End => return false,
                Target::Run => break,
                Target::Hold => state = self.attend(&shared, state),
            }
        }
        self.immediate_exit.set(0);
        state.holding -= 1;
        if state.first_run_ns == 0 {
            state.first_run_ns = monotonic_ns();
        }
        true
    }

    /// After an outcome: the VM is over, this vCPU runs no more.
    fn wait_for_end(&mut self) {
        let shared = self.shared.clone();
        let mut state = shared.lock();
        while state.target != Target::End {
            state = self.attend(&shared, state);
        }
    }

    /// Does the visit that it has not done yet, or waits for a change.
    fn attend<'a>(
        &mut self,
        shared: &'a Shared,
        mut state: MutexGuard<'a, State>,
    ) -> MutexGuard<'a, State> {
        if self.visits == state.visits {
            return shared.wait(state);
        }
        self.visits = state.visits;
        if let Some(visit) = state.visit.clone() {
            drop(state);
            visit(self.index, &self.vcpu);
            state = shared.lock();
            state.visited += 1;
            shared.changed.notify_all();
        }
        state
    }

    /// Runs guest code until somebody kicks this thread.
    fn run_until_kicked(&mut self) -> Result<(), VcpuError> {
        loop {
            match exit::run_once(&mut self.vcpu, &self.bus)? {
                exit::After::GoOn => {}
                exit::After::Interrupted => {
                    // An exit that needed an answer (a read) is completed by KVM at its next entry;
                    // entering with immediate_exit set does that and nothing else, so that here the
                    // vCPU is between two instructions.
                    let state = self.shared.lock();
                    if state.target != Target::Run {
                        return Ok(());
                    }
                    self.immediate_exit.set(0);
                }
            }
        }
    }
}

impl From<VcpuError> for Outcome {
    fn from(error: VcpuError) -> Self {
        match error {
            VcpuError::Ended(outcome) => outcome,
            other => Outcome::Failed {
                causes: crate::causes(&other),
            },
        }
    }
}
