//! The bridge's state: providers, VMs and their runs; and what its control socket may ask of it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use ratoon_bridge_api::control::{
    AddVm, BranchUsage, MAX_TOKEN_TTL_S, MintToken, Reply, Request, is_id,
};
use ratoon_bridge_api::record::Entry;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};

use crate::config::{Config, HostLimits};
use crate::key::{Key, KeyError};
use crate::mask::Masker;
use crate::record::{Run, RunError};
use crate::token::Tokens;
use crate::upstream::{Upstream, UpstreamError};
use crate::{server, socket};

/// How long a removed VM's calls have to end.
const FAREWELL: Duration = Duration::from_secs(5);
/// Refusals of one VM that are recorded one by one.
const MOST_REFUSALS: u32 = 1000;

/// All of it.
#[derive(Debug)]
pub struct Bridge {
    pub(crate) config: Config,
    pub(crate) upstreams: Vec<Upstream>,
    pub(crate) masker: Arc<Masker>,
    /// Kibibytes of request bodies.
    pub(crate) bodies: Arc<Semaphore>,
    pub(crate) calls: Arc<Semaphore>,
    pub(crate) connections: Arc<Semaphore>,
    /// Whoever started this: the engine's user, and as a rule the VMMs'.
    pub(crate) owner: u32,
    vms: Mutex<HashMap<String, Arc<Vm>>>,
    runs: Mutex<HashMap<String, Weak<Run>>>,
}

/// A VM that may call models.
#[derive(Debug)]
pub struct Vm {
    pub(crate) id: String,
    pub(crate) branch: String,
    pub(crate) run: Arc<Run>,
    pub(crate) models: Option<Vec<String>>,
    pub(crate) tokens: Mutex<Tokens>,
    pub(crate) calls: Arc<Semaphore>,
    pub(crate) bodies: Arc<Semaphore>,
    /// One large request at a time is taken apart.
    pub(crate) parsing: Arc<Semaphore>,
    pub(crate) gone: watch::Sender<bool>,
    rate: Mutex<(Instant, u32)>,
    refusals: Mutex<(u32, u64)>,
}

/// Why the bridge cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No provider.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

/// Why it refuses what it is told.
#[derive(Debug, thiserror::Error)]
pub enum TellError {
    /// It makes no sense.
    #[error("{0}")]
    Wrong(String),
    /// The run's record cannot be used.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A file or socket cannot be made.
    #[error("{what}")]
    Io {
        /// What.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn wrong(what: impl Into<String>) -> TellError {
    TellError::Wrong(what.into())
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> TellError {
    let what = what.into();
    move |source| TellError::Io { what, source }
}

impl Bridge {
    /// Takes a configuration and loads its keys. Whoever this process runs as now is its owner.
    ///
    /// # Errors
    /// When a key or a provider cannot be used.
    pub fn new(config: Config) -> Result<Arc<Self>, StartError> {
        let mut keys = Vec::new();
        for provider in &config.providers {
            keys.push(Key::load(&provider.name, &provider.key)?);
        }
        let connect = HostLimits::seconds(config.limits.connect_s);
        let upstreams = config
            .providers
            .iter()
            .zip(&keys)
            .map(|(provider, key)| Upstream::new(provider, key.as_ref(), connect))
            .collect::<Result<_, _>>()?;
        let secrets: Vec<&[u8]> = keys.iter().flatten().map(Key::bytes).collect();
        Ok(Arc::new(Self {
            upstreams,
            masker: Arc::new(Masker::new(&secrets)),
            bodies: Arc::new(Semaphore::new(
                (config.limits.all_bodies_bytes / 1024) as usize,
            )),
            calls: Arc::new(Semaphore::new(config.limits.all_calls as usize)),
            connections: Arc::new(Semaphore::new(socket::most_connections(
                config.limits.all_connections,
            ))),
            config,
            owner: rustix::process::geteuid().as_raw(),
            vms: Mutex::default(),
            runs: Mutex::default(),
        }))
    }

    /// Does what the control socket asks. A request that needs a descriptor takes the first of `fds`.
    ///
    /// # Errors
    /// When it cannot; nothing has changed then.
    pub async fn tell(
        self: &Arc<Self>,
        request: Request,
        fds: &mut VecDeque<OwnedFd>,
    ) -> Result<Reply, TellError> {
        match request {
            Request::AddVm(add) => self.add(add, fds.pop_front()),
            Request::MintToken(mint) => self.mint(&mint),
            Request::RemoveVm(remove) => self.remove(&remove.vm).await,
            Request::Rested(rested) => {
                let vm = self.vm(&rested.vm)?;
                vm.run
                    .rest(&vm.branch)
                    .map_err(io("the record cannot be written"))?;
                Ok(Reply::Rested {})
            }
            Request::Usage(of) => self.usage(&of.run),
            Request::Status {} => {
                let vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
                let mut ids: Vec<String> = vms.keys().cloned().collect();
                ids.sort();
                Ok(Reply::Status {
                    vms: ids,
                    calls_in_flight: self.config.limits.all_calls as usize
                        - self.calls.available_permits(),
                })
            }
        }
    }

    fn add(self: &Arc<Self>, add: AddVm, listener: Option<OwnedFd>) -> Result<Reply, TellError> {
        for id in [
            Some(&add.vm),
            Some(&add.run),
            Some(&add.branch),
            add.parent.as_ref(),
        ]
        .into_iter()
        .flatten()
        {
            if !is_id(id) {
                return Err(wrong(format!(
                    "\"{}\" is no id: 1 to 64 letters, digits, dots, dashes and underscores, no dot in front",
                    crate::rules::shown(id)
                )));
            }
        }
        for model in add.models.iter().flatten() {
            let known = self.config.providers.iter().flat_map(|p| &p.models);
            if !known.into_iter().any(|known| known.id == *model) {
                return Err(wrong(format!(
                    "model \"{model}\" is not in the configuration"
                )));
            }
        }
        let mut vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        if vms.contains_key(&add.vm) {
            return Err(wrong(format!("VM \"{}\" is there already", add.vm)));
        }
        let same_branch = |vm: &&Arc<Vm>| vm.branch == add.branch && vm.run.name() == add.run;
        if let Some(other) = vms.values().find(same_branch) {
            return Err(wrong(format!(
                "VM \"{}\" works on branch \"{}\" of this run: one at a time",
                other.id, add.branch
            )));
        }
        let run = self.open_run(&add.run)?;
        // The socket first: a branch that nobody can reach is not begun.
        let listener = listener.ok_or_else(|| wrong("no listening socket came with it"))?;
        let listener =
            socket::listener(listener).map_err(io("what came with it does not listen"))?;
        run.begin(&add.branch, add.parent.as_deref(), add.budget)?;
        run.append(&add.branch, Entry::Vm { vm: add.vm.clone() })
            .map_err(io("the record cannot be written"))?;
        let head = run.state().head(&add.branch);
        let limits = &self.config.limits;
        let vm = Arc::new(Vm {
            id: add.vm.clone(),
            branch: add.branch,
            run,
            models: add.models,
            tokens: Mutex::default(),
            calls: Arc::new(Semaphore::new(limits.vm_calls as usize)),
            bodies: Arc::new(Semaphore::new((limits.vm_bodies_bytes / 1024) as usize)),
            parsing: Arc::new(Semaphore::new(1)),
            gone: watch::Sender::new(false),
            rate: Mutex::new((Instant::now(), limits.vm_requests_a_minute)),
            refusals: Mutex::default(),
        });
        vms.insert(add.vm, vm.clone());
        self.listen(listener, vm);
        Ok(Reply::VmAdded {
            head: head.0,
            everyone: !self.config.peer_uids.is_empty(),
        })
    }

    fn listen(self: &Arc<Self>, listener: UnixListener, vm: Arc<Vm>) {
        let bridge = self.clone();
        tokio::spawn(async move { server::serve(bridge, vm, listener).await });
    }

    fn open_run(&self, name: &str) -> Result<Arc<Run>, TellError> {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        runs.retain(|_, run| run.strong_count() > 0);
        if let Some(run) = runs.get(name).and_then(Weak::upgrade) {
            return Ok(run);
        }
        let most = self.config.limits.run_record_bytes;
        let run = Run::open(&self.config.records, name, self.masker.clone(), most)?;
        let run = Arc::new(run);
        runs.insert(name.to_owned(), Arc::downgrade(&run));
        Ok(run)
    }

    fn mint(&self, mint: &MintToken) -> Result<Reply, TellError> {
        if mint.ttl_s == 0 || mint.ttl_s > MAX_TOKEN_TTL_S {
            return Err(wrong(format!(
                "a token lives from 1 to {MAX_TOKEN_TTL_S} seconds, not {}",
                mint.ttl_s
            )));
        }
        let vm = self.vm(&mint.vm)?;
        if mint.revoke_older {
            // It wakes.
            vm.run
                .rest(&vm.branch)
                .map_err(io("the record cannot be written"))?;
        }
        let mut tokens = vm.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let ttl_s = mint.ttl_s.min(self.config.limits.token_s);
        let ttl = HostLimits::seconds(ttl_s);
        let (token, id) = tokens
            .mint(Instant::now(), ttl, mint.revoke_older)
            .map_err(io("no token can be made"))?;
        let entry = Entry::Token {
            vm: vm.id.clone(),
            id,
            ttl_s,
        };
        if let Err(error) = vm.run.append(&vm.branch, entry) {
            *tokens = Tokens::default();
            return Err(io("the record cannot be written")(error));
        }
        Ok(Reply::Token {
            token,
            expires_in_s: ttl_s,
        })
    }

    async fn remove(&self, id: &str) -> Result<Reply, TellError> {
        let vm = self.vm(id)?;
        {
            let _no_call_begins = vm.run.state();
            vm.gone.send_replace(true);
        }
        *vm.tokens.lock().unwrap_or_else(PoisonError::into_inner) = Tokens::default();
        let all = self.config.limits.vm_calls;
        let ended = tokio::time::timeout(FAREWELL, vm.calls.acquire_many(all)).await;
        if !matches!(ended, Ok(Ok(_))) {
            tracing::warn!(vm = id, "calls of a removed VM have not ended");
        }
        let refusals_untold = vm.refusals.lock().unwrap_or_else(PoisonError::into_inner).1;
        let entry = Entry::VmGone {
            vm: id.to_owned(),
            refusals_untold,
        };
        let written = vm.run.append(&vm.branch, entry);
        let head = vm.run.state().head(&vm.branch);
        // Only now may another VM go on with the branch.
        self.vms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
        written.map_err(io("the VM is gone; the record cannot be written"))?;
        Ok(Reply::VmRemoved { head: head.0 })
    }

    fn usage(&self, run: &str) -> Result<Reply, TellError> {
        if !is_id(run) || !self.config.records.join(run).is_dir() {
            return Err(wrong(format!(
                "there is no run \"{}\"",
                crate::rules::shown(run)
            )));
        }
        let run = self.open_run(run)?;
        let state = run.state();
        let branches = state
            .tree
            .iter()
            .map(|(branch, node)| BranchUsage {
                branch: branch.clone(),
                parent: node.parent.clone(),
                budget: node.limits,
                spent: node.spent,
                reserved: node.reserved,
                head: state.head(branch).0,
            })
            .collect();
        Ok(Reply::Usage { branches })
    }

    fn vm(&self, id: &str) -> Result<Arc<Vm>, TellError> {
        self.vms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .filter(|vm| !*vm.gone.borrow())
            .cloned()
            .ok_or_else(|| wrong(format!("there is no VM \"{}\"", crate::rules::shown(id))))
    }

    /// Ends everything: records are whole, nobody is served.
    pub async fn end(&self) {
        let ids: Vec<String> = {
            let vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
            vms.keys().cloned().collect()
        };
        for id in ids {
            if let Err(error) = self.remove(&id).await {
                tracing::warn!(vm = id, "at the end: {error}");
            }
        }
    }

    /// Where runs are recorded.
    #[must_use]
    pub fn records(&self) -> &Path {
        &self.config.records
    }
}

impl Vm {
    /// Counts a request; false when there were too many in this minute.
    pub(crate) fn may_ask(&self, a_minute: u32) -> bool {
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        if rate.0.elapsed() >= Duration::from_secs(60) {
            *rate = (Instant::now(), a_minute);
        }
        let Some(left) = rate.1.checked_sub(1) else {
            return false;
        };
        rate.1 = left;
        true
    }

    /// Records a refusal, unless the guest makes too many of them.
    pub(crate) fn refused(&self, refusal: &crate::refusal::Refusal) {
        {
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            if refusals.0 >= MOST_REFUSALS {
                refusals.1 += 1;
                return;
            }
            refusals.0 += 1;
        }
        let entry = Entry::Refused {
            vm: self.id.clone(),
            code: refusal.code.name().to_owned(),
            message: refusal.message.clone(),
        };
        if let Err(error) = self.run.append(&self.branch, entry) {
            tracing::error!(vm = self.id, "the record cannot be written: {error}");
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            refusals.1 += 1;
        }
    }
}
