//! Files: `file.*` and `tree.*`.
//!
//! Every path is absolute, or relative to the user's home when there is a `user`, else to `/`. With
//! `root` a path is taken from there, and neither `..` nor a symlink leads out of it. A path has at
//! most 4096 bytes; trees are worked on 100 directories deep, and what is deeper is refused.

use serde::{Deserialize, Serialize};

/// Parameters of `file.read`: the bytes come as STDOUT; the reply is [`Transferred`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRead {
    /// Which file.
    pub path: String,
    /// Directory that the path may not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// Where to begin, in bytes.
    #[serde(default)]
    pub offset: u64,
    /// How many bytes at most; without it, to the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
}

/// Parameters of `file.write`: the bytes come as STDIN, to its END; the reply is [`Transferred`].
/// Without `append` and `offset` the file is written under a temporary name beside it and renamed
/// when it is whole: others see the old content or the new, and an upload that breaks off leaves
/// nothing. A symlink at `path` is replaced, not followed. With `append`, what others add meanwhile
/// is in the reply's `bytes` too.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileWrite {
    /// Which file.
    pub path: String,
    /// Directory that the path may not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// Permission bits of the file, e.g. 0o644. Default: those of the regular file that is replaced,
    /// without setuid, setgid and sticky, or 0o644.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
    /// `user` or `user:group` who will own it, as for `exec`. Default: the owner of the regular file
    /// that is replaced, or root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Write at the end of the file as it is.
    #[serde(default)]
    pub append: bool,
    /// Write into the file as it is, from this byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Make missing directories above it (mode 0o755, same owner).
    #[serde(default)]
    pub parents: bool,
}

/// Reply of calls that move bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transferred {
    /// How many bytes.
    pub bytes: u64,
    /// Files, directories and links, for trees; 1 for a file.
    #[serde(default)]
    pub entries: u64,
}

/// A path, for calls that need no more: `file.stat`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePath {
    /// Which.
    pub path: String,
    /// Directory that the path may not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// Describe what a symlink at the end leads to, not the link.
    #[serde(default)]
    pub follow: bool,
}

/// What a directory entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A socket, pipe or device.
    #[serde(other)]
    Other,
}

/// One file, directory, link, … Reply of `file.stat`; a line of `file.list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Full path (in a list: below the directory that was listed). Bytes that are not UTF-8 are
    /// replaced by U+FFFD.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Length in bytes.
    pub size: u64,
    /// Permission bits, e.g. 0o644.
    pub mode: u32,
    /// Owner's number.
    pub uid: u32,
    /// Group's number.
    pub gid: u32,
    /// Last change of the content, microseconds since 1970.
    pub modified_us: i64,
    /// Where a symlink leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// Parameters of `file.list`: a line of JSON for each [`FileEntry`] comes as STDOUT, a directory
/// before what is in it, by name; the reply is [`Transferred`]. Symlinks are told, not followed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileList {
    /// The directory.
    pub path: String,
    /// Directory that the path may not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// How deep; 1 (the default): what is in it. 0: all, at most 100 deep.
    #[serde(default = "one")]
    pub depth: u32,
    /// Only entries whose path below the directory fits: `*` (not `/`), `**` (anything), `?`, `[a-z]`,
    /// `{a,b}`. A pattern without `/` is held against the name alone. At most 4096 bytes, 64
    /// alternatives, braces 8 deep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub glob: Option<String>,
}

fn one() -> u32 {
    1
}

/// Parameters of `file.mkdir`; the reply is `null`. A directory that is there is no error with
/// `parents`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMkdir {
    /// The directory.
    pub path: String,
    /// Directory that the path may not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// Permission bits; default 0o755.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
    /// `user` or `user:group`; default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Make missing directories above it.
    #[serde(default)]
    pub parents: bool,
}

/// Parameters of `file.remove`; the reply is [`Transferred`] (entries). Symlinks are removed, not
/// followed; a directory on which something is mounted is refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRemove {
    /// What to remove.
    pub path: String,
    /// Directory that the path may not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// A directory with all that is in it.
    #[serde(default)]
    pub recursive: bool,
    /// What is not there is no error.
    #[serde(default)]
    pub missing_ok: bool,
}

/// Parameters of `file.rename` and `file.copy`. The reply of rename is `null`, of copy
/// [`Transferred`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMove {
    /// What there is.
    pub from: String,
    /// Its new (or second) name; not a directory to put it into.
    pub to: String,
    /// Directory that neither path may leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// A file at `to` may be replaced.
    #[serde(default)]
    pub replace: bool,
    /// Copy a directory with all that is in it.
    #[serde(default)]
    pub recursive: bool,
}

/// Parameters of `file.watch`: a line of JSON for each [`FileChange`] comes as STDOUT, until the
/// client takes no more of it (ACK with END) or what is watched is removed, moved or unmounted (told
/// as `removed`); the reply is [`Transferred`] (entries). EVENT `watching` says that nothing is missed
/// from now on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileWatch {
    /// A file or directory.
    pub path: String,
    /// Directory that the path may not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// Directories below it too, new ones as they come: at most 8192, 100 deep. When there are more
    /// the call ends with an error.
    #[serde(default)]
    pub recursive: bool,
}

/// What happened to a watched file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It is new, or was moved here.
    Created,
    /// Its content changed.
    Written,
    /// Its mode, owner or times changed.
    Attributes,
    /// It is gone, or was moved away.
    Removed,
    /// Changes came faster than they were taken: look at everything again.
    #[serde(other)]
    Overflow,
}

/// A line of `file.watch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// What.
    pub change: ChangeKind,
    /// Which, as a full path; empty for an overflow.
    pub path: String,
    /// It is a directory.
    #[serde(default)]
    pub directory: bool,
}

/// Parameters of `tree.pack`: a tar archive comes as STDOUT; the reply is [`Transferred`]. Names in
/// it begin with the path's last component. Owners, modes, times (in seconds), links and hard links
/// are kept; extended attributes (with them ACLs and capabilities) are not, and sockets are left out.
/// What vanishes meanwhile is left out; a file that shrinks is filled up with zeros.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreePack {
    /// A directory, file or link.
    pub path: String,
    /// Directory that the path may not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// Follow a symlink at the end of the path; those in the tree never are.
    #[serde(default)]
    pub follow: bool,
    /// Name of the first component in the archive instead of the path's own; `.` leaves it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Parameters of `tree.unpack`: a tar archive comes as STDIN, to its END; the reply is
/// [`Transferred`]. Nothing of it lands outside the directory, whatever its names and links say.
/// Extended attributes are not unpacked. A directory has its time when its contents follow it, as
/// `tree.pack` and tar write them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeUnpack {
    /// The directory; made if it is missing.
    pub path: String,
    /// Directory that the path may not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// `user` or `user:group` who owns everything; default: as the archive says, by number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}
