//! What the process gives away once it has its keys and its sockets, so that whoever took it over by an answer or
//! a request of a guest's would have little.
//!
//! ```text
//!   started as root: the records' folder handed over -> a user of its own -> Landlock -> seccomp -> serves
//!   as anybody else:                                                         Landlock -> seccomp -> serves
//! ```
//!
//! After [`Confined`] it cannot become anybody else, start a program, write or read a file but the records and what
//! name resolution reads, or listen at a port. Sockets of VMs come over the control socket as descriptors, and the
//! records' folder is its working directory: so folders above them may be closed to it.
//!
//! How it fails: [`ConfineError`], and then it does not serve. A kernel without Landlock is told in the log alone.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, lchown};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
    RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::key;
use crate::syscalls::{self, FilterError};

/// The user and group of a bridge that root starts. No distribution gives it to anybody, and it is there in user
/// namespaces of 65536 ids as well.
pub const OWN_ID: u32 = 65_525;
/// What is read: random numbers, and for name resolution `/etc` and where its `resolv.conf` often leads.
const READ: &[&str] = &[
    "/dev/random",
    "/dev/urandom",
    "/etc",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
];
/// What is known of the kernel's rules here: the newest that the kernel has of these is used.
const KNOWN: ABI = ABI::V6;

/// Why the process is not confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The records' folder.
    #[error("the records' folder {} cannot be used", path.display())]
    Records {
        /// Which file of it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is root's, and there are other things in it.
    #[error(
        "the records' folder {} is root's and has {} in it, which is no run's record: name a folder of its own in \
         \"records\", or give that one to a user, who the bridge then is", path.display(), found.display()
    )]
    NotRecords {
        /// The folder.
        path: PathBuf,
        /// What is in it.
        found: PathBuf,
    },
    /// Becoming another user.
    #[error("cannot become user {id}")]
    User {
        /// Which.
        id: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Landlock.
    #[error("cannot close the file system to this process")]
    Files(#[from] RulesetError),
    /// Seccomp.
    #[error("cannot limit this process's system calls")]
    Calls(#[from] FilterError),
    /// The rest.
    #[error("cannot give up new privileges")]
    Privileges(#[source] io::Error),
}

/// The process is confined. Records are below the working directory.
#[derive(Debug)]
pub struct Confined(());

impl Confined {
    /// Confines this process, which has one thread. See the module.
    ///
    /// # Errors
    /// [`ConfineError`]: it must not serve then.
    pub fn now(records: &Path) -> Result<Self, ConfineError> {
        let failed = |source| ConfineError::Records {
            path: records.to_owned(),
            source,
        };
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(records)
            .map_err(failed)?;
        let id = match rustix::process::geteuid().is_root() {
            true => Some(own(records)?),
            false => None,
        };
        std::env::set_current_dir(records).map_err(failed)?;
        if let Some(id) = id {
            become_user(id).map_err(|source| ConfineError::User { id, source })?;
        }
        key::no_new_privileges().map_err(ConfineError::Privileges)?;
        close_files()?;
        syscalls::limit()?;
        Ok(Self(()))
    }
}

/// Whom the folder belongs to, if that is not root; else it is handed over.
fn own(records: &Path) -> Result<u32, ConfineError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ConfineError::Records { path, source }
    };
    let owner = fs::metadata(records).map_err(failed(records))?.uid();
    if owner != 0 {
        return Ok(owner);
    }
    // Nobody but root could write here till now, so nothing in it leads elsewhere.
    let mut all = Vec::new();
    for run in list(records).map_err(failed(records))? {
        // A run's first file is its lock (`record.rs`).
        if !run.join("bodies").is_dir() || !run.join("lock").is_file() {
            return Err(ConfineError::NotRecords {
                path: records.to_owned(),
                found: run,
            });
        }
        all.extend(list(&run.join("bodies")).map_err(failed(&run))?);
        all.extend(list(&run).map_err(failed(&run))?);
        all.push(run);
    }
    // The folder last: after that others than root write in it.
    all.push(records.to_owned());
    for path in all {
        lchown(&path, Some(OWN_ID), Some(OWN_ID)).map_err(failed(&path))?;
    }
    Ok(OWN_ID)
}

fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

fn become_user(id: u32) -> io::Result<()> {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    set_thread_groups(&[])?;
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    // The kernel has made it dumpable again, perhaps.
    key::harden()
}

fn close_files() -> Result<(), RulesetError> {
    let mut read: Vec<PathBuf> = READ.iter().map(PathBuf::from).collect();
    // It is replaced when the network changes: so its folder.
    let resolv = fs::canonicalize("/etc/resolv.conf").ok();
    read.extend(resolv.and_then(|path| Some(path.parent()?.to_owned())));
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(KNOWN))?
        .create()?
        .add_rules(path_beneath_rules(["."], AccessFs::from_all(KNOWN)))?
        .add_rules(path_beneath_rules(
            read,
            AccessFs::from_read(KNOWN) & !AccessFs::Execute,
        ))?
        .restrict_self()?;
    if status.ruleset != RulesetStatus::FullyEnforced {
        tracing::warn!(
            "this kernel's Landlock is missing or old: files are closed to this process as far as their modes go"
        );
    }
    Ok(())
}
