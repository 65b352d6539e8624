//! Where Ratoon keeps things: the XDG base directories.
//!
//! ```text
//! $XDG_STATE_HOME/ratoon/vms/<id>/     one directory a VM           (default ~/.local/state)
//! $XDG_CACHE_HOME/ratoon/images/       images                       (default ~/.cache)
//! $XDG_CACHE_HOME/ratoon/kernel/default/vmlinux   the guest kernel
//! ```
//!
//! It fails only when neither the variable nor `HOME` says where.

use std::path::{Path, PathBuf};

/// Ratoon's directories. They are made by whoever first writes into them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirs {
    state: PathBuf,
    cache: PathBuf,
}

/// Why the directories cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("neither {variable} nor HOME is set to an absolute path: set one of them")]
pub struct DirsError {
    variable: &'static str,
}

impl Dirs {
    /// Directories of one's own choice, e.g. for an embedding program or a test.
    pub fn new(state: impl Into<PathBuf>, cache: impl Into<PathBuf>) -> Self {
        Self {
            state: state.into(),
            cache: cache.into(),
        }
    }

    /// The XDG directories of this process's user.
    ///
    /// # Errors
    /// [`DirsError`] when the environment does not name them.
    pub fn from_env() -> Result<Self, DirsError> {
        Self::from_lookup(|name| std::env::var_os(name).map(PathBuf::from))
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<PathBuf>) -> Result<Self, DirsError> {
        // The XDG specification has relative paths ignored.
        let absolute = |name: &str| lookup(name).filter(|path| path.is_absolute());
        let base = |variable: &'static str, under_home: &str| {
            absolute(variable)
                .or_else(|| absolute("HOME").map(|home| home.join(under_home)))
                .map(|base| base.join("ratoon"))
                .ok_or(DirsError { variable })
        };
        Ok(Self {
            state: base("XDG_STATE_HOME", ".local/state")?,
            cache: base("XDG_CACHE_HOME", ".cache")?,
        })
    }

    /// What must outlive a command: VM records.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// What can be made again: images, kernels, initramfs.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// One directory a VM.
    pub fn vms(&self) -> PathBuf {
        self.state.join("vms")
    }

    /// The sockets of processes that serve snapshots' memory.
    pub fn pagers(&self) -> PathBuf {
        self.state.join("pagers")
    }

    /// The guest kernel that is used when none is named.
    pub fn default_kernel(&self) -> PathBuf {
        self.cache.join("kernel/default/vmlinux")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(vars: &[(&str, &str)]) -> Result<Dirs, DirsError> {
        Dirs::from_lookup(|name| {
            vars.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| PathBuf::from(value))
        })
    }

    #[test]
    fn xdg_variables_come_before_home() {
        let dirs = with(&[("HOME", "/h"), ("XDG_STATE_HOME", "/s")]).unwrap();
        assert_eq!(dirs, Dirs::new("/s/ratoon", "/h/.cache/ratoon"));
    }

    #[test]
    fn a_relative_xdg_path_is_ignored() {
        let dirs = with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "here")]).unwrap();
        assert_eq!(
            dirs,
            Dirs::new("/h/.local/state/ratoon", "/h/.cache/ratoon")
        );
    }

    #[test]
    fn without_any_home_the_variable_is_named() {
        let error = with(&[("XDG_CACHE_HOME", "/c")]).unwrap_err();
        assert_eq!(
            error,
            DirsError {
                variable: "XDG_STATE_HOME"
            }
        );
    }
}
