//! Who a process runs as: `user[:group]`, each by name or number, from passwd(5) and group(5).
//!
//! How it fails: a name that is in neither file is [`UserError::NoUser`] or
//! [`UserError::NoGroup`]; a number needs no entry. Broken lines are skipped, as libc does.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

/// The files are the image's: more than this of them is not read.
const FILE_LIMIT: u64 = 4 << 20;

/// A process's identity and what the environment says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Login name; the number when it has none.
    pub name: String,
    /// Home directory; `/` when it has none.
    pub home: String,
}

impl User {
    /// Root, without a look at any file.
    pub fn root() -> Self {
        Self {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            name: "root".into(),
            home: "/root".into(),
        }
    }

    /// Whether a process of the runtime need not change its ids to be this user.
    pub fn is_plain_root(&self) -> bool {
        self.uid == 0 && self.gid == 0 && self.groups.is_empty()
    }
}

/// Why there is no such identity.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Not in the passwd file.
    #[error("no user `{}` in {file}", name.escape_debug())]
    NoUser {
        /// As asked for.
        name: String,
        /// Where it was looked up.
        file: String,
    },
    /// Not in the group file.
    #[error("no group `{}` in {file}", name.escape_debug())]
    NoGroup {
        /// As asked for.
        name: String,
        /// Where it was looked up.
        file: String,
    },
    /// A file is there and cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// Which.
        file: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn read(path: &Path) -> Result<String, UserError> {
    let mut text = Vec::new();
    let result = fs::File::open(path).and_then(|file| file.take(FILE_LIMIT).read_to_end(&mut text));
    match result {
        Ok(_) => Ok(String::from_utf8_lossy(&text).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(UserError::Read {
            file: path.display().to_string(),
            source,
        }),
    }
}

fn is_number(text: &str) -> Option<u32> {
    // u32::MAX is "leave it" to the kernel.
    text.parse().ok().filter(|&id| id != u32::MAX)
}

/// Finds `spec` (`user` or `user:group`) in `etc`/passwd and `etc`/group.
///
/// # Errors
/// See [`UserError`].
pub fn find(spec: &str, etc: &Path) -> Result<User, UserError> {
    let (name, group) = match spec.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    let passwd_path = etc.join("passwd");
    let passwd = read(&passwd_path)?;
    let number = is_number(name);
    let entry = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (login, _, uid, gid) = (
            fields.next()?,
            fields.next()?,
            is_number(fields.next()?)?,
            is_number(fields.next()?)?,
        );
        let home = fields.nth(1).unwrap_or("");
        (login == name || number == Some(uid)).then_some((login, uid, gid, home))
    });
    let mut user = match (entry, number) {
        (Some((login, uid, gid, home)), _) => User {
            uid,
            gid,
            groups: Vec::new(),
            name: login.into(),
            home: if home.is_empty() { "/" } else { home }.into(),
        },
        (None, Some(uid)) => User {
            uid,
            gid: 0,
            groups: Vec::new(),
            name: uid.to_string(),
            home: "/".into(),
        },
        (None, None) => {
            return Err(UserError::NoUser {
                name: name.into(),
                file: passwd_path.display().to_string(),
            });
        }
    };
    let group_path = etc.join("group");
    match group {
        Some(group) => {
            user.gid = match is_number(group) {
                Some(gid) => gid,
                None => groups(&read(&group_path)?)
                    .find(|(name, ..)| *name == group)
                    .map(|(_, gid, _)| gid)
                    .ok_or_else(|| UserError::NoGroup {
                        name: group.into(),
                        file: group_path.display().to_string(),
                    })?,
            };
        }
        None if entry.is_some() => {
            user.groups = groups(&read(&group_path)?)
                .filter(|(_, _, members)| members.split(',').any(|member| member == user.name))
                .map(|(_, gid, _)| gid)
                .take(MAX_GROUPS)
                .collect();
        }
        None => {}
    }
    Ok(user)
}

/// As many supplementary groups as the kernel takes (`NGROUPS_MAX`, linux/limits.h).
const MAX_GROUPS: usize = 65536;

fn groups(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = is_number(fields.nth(1)?)?;
        Some((name, gid, fields.next().unwrap_or("")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etc() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("passwd"),
            "broken line\nroot:x:0:0:root:/root:/bin/sh\n# note\nann:x:1000:1001:,,,:/home/ann:/bin/sh\nno:x:7:8::\n",
        )
        .unwrap();
        fs::write(
            dir.path().join("group"),
            "root:x:0:\nann:x:1001:\nvideo:x:44:bob,ann\nx\naudio:x:45:ann\nannex:x:46:annex\n",
        )
        .unwrap();
        dir
    }

    #[test]
    fn a_name_and_its_number_are_the_same_user_with_all_groups() {
        let etc = etc();
        let ann = find("ann", etc.path()).unwrap();
        assert_eq!(
            (ann.uid, ann.gid, ann.groups.as_slice()),
            (1000, 1001, &[44, 45][..])
        );
        assert_eq!(ann.home, "/home/ann");
        assert_eq!(find("1000", etc.path()).unwrap(), ann);
    }

    #[test]
    fn a_group_that_is_named_replaces_the_others() {
        let etc = etc();
        let ann = find("ann:video", etc.path()).unwrap();
        assert_eq!((ann.gid, ann.groups.len()), (44, 0));
        assert_eq!(find("1000:12", etc.path()).unwrap().gid, 12);
    }

    #[test]
    fn a_number_needs_no_entry_and_no_file() {
        let empty = tempfile::tempdir().unwrap();
        let user = find("4242", empty.path()).unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_str()), (4242, 0, "/"));
        assert_eq!(user.name, "4242");
    }

    #[test]
    fn an_unknown_name_is_refused_by_name_and_file() {
        let etc = etc();
        let error = find("eve", etc.path()).unwrap_err();
        assert!(matches!(error, UserError::NoUser { .. }));
        assert!(
            error.to_string().starts_with("no user `eve` in "),
            "{error}"
        );
        let error = find("ann:wheel", etc.path()).unwrap_err();
        assert!(matches!(error, UserError::NoGroup { ref name, .. } if name == "wheel"));
    }

    #[test]
    fn the_id_that_means_leave_it_is_no_number() {
        let etc = etc();
        assert!(matches!(
            find("4294967295", etc.path()),
            Err(UserError::NoUser { .. })
        ));
    }
}
