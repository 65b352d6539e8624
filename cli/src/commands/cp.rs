//! `ratoon cp`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ratoon_client::RuntimeError;
use ratoon_client::blocking::Client;
use ratoon_engine::Engine;
use ratoon_protocol::{
    Call, ErrorCode, FileEntry, FileKind, FilePath, FileRead, FileWrite, TreePack, TreeUnpack,
};

use crate::failure::Failure;
use crate::guest;

/// Copy files and directories into a running VM, or out of it.
///
/// A directory is copied with all that is in it, symlinks as they are; modes and times are kept, and hard
/// links out of the VM. A single file keeps its mode, not its time. If the destination is a directory, the
/// source is put into it; otherwise the destination is the copy's name. `-` is a tar archive on standard
/// input or output. A file appears whole under its name, or not at all.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon cp notes.txt web:/srv/
  ratoon cp web:/var/log/app.log .
  ratoon cp src web:/srv               # web:/srv/src, or web:/srv if that is not there
  ratoon cp -u app src web:/home/app
  ratoon cp web:/etc - | tar t")]
pub struct Args {
    /// Who owns the copies in the guest: user, uid, user:group or uid:gid.
    #[arg(long, short, value_name = "USER", default_value = "root")]
    user: String,
    /// What to copy: PATH, or VM:PATH.
    #[arg(value_name = "SOURCE")]
    source: String,
    /// Where to: VM:PATH, or PATH.
    #[arg(value_name = "DESTINATION")]
    destination: String,
}

/// `VM:PATH`; a path with a `/` before its first `:` is one of this host.
fn in_guest(text: &str) -> Option<(&str, &str)> {
    let (vm, path) = text.split_once(':')?;
    (!vm.is_empty() && !vm.contains('/')).then_some((vm, path))
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    match (in_guest(&args.source), in_guest(&args.destination)) {
        (None, Some((vm, path))) => {
            let mut client = guest::connect(&guest::find(engine, vm)?)?;
            put(&mut client, args, &args.source, non_empty(path))?;
        }
        (Some((vm, path)), None) => {
            let mut client = guest::connect(&guest::find(engine, vm)?)?;
            get(&mut client, non_empty(path), &args.destination)?;
        }
        (Some(_), Some(_)) => {
            return Err(Failure::new("both are in a VM")
                .hint("copy to this host first")
                .code(2));
        }
        (None, None) => {
            return Err(Failure::new("neither is in a VM: one must be VM:PATH").code(2));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn non_empty(path: &str) -> &str {
    if path.is_empty() { "." } else { path }
}

/// The last component of a path, for a copy into a directory.
fn base_name(path: &str) -> Option<String> {
    let name = Path::new(path).file_name()?;
    Some(name.to_string_lossy().into_owned())
}

fn stat(client: &mut Client, path: &str) -> Result<Option<FileEntry>, Failure> {
    let call = Call::FileStat(FilePath {
        path: path.into(),
        root: None,
        follow: true,
    });
    match client.call(&call, "looked at the path", guest::CALL_TIMEOUT) {
        Ok(entry) => Ok(Some(entry)),
        Err(RuntimeError::Call(error)) if error.code == ErrorCode::NotFound => Ok(None),
        Err(error) => Err(guest::failure(error, &format!("{path} in the VM"))),
    }
}

fn put(client: &mut Client, args: &Args, source: &str, path: &str) -> Result<(), Failure> {
    let owner = Some(args.user.clone());
    if source == "-" {
        let stdin = io::stdin();
        let call = unpack(path.into(), owner);
        return transfer(client, &call, Some(stdin.as_fd()), &mut io::sink(), path);
    }
    let unreadable = |error| Failure::new(format!("cannot read {source}: {error}"));
    let metadata = fs::symlink_metadata(source).map_err(unreadable)?;
    let mut target = PathBuf::from(path);
    let into_directory = stat(client, path)?.is_some_and(|entry| entry.kind == FileKind::Directory);
    if into_directory || path.ends_with('/') {
        let name = fs::canonicalize(source).ok();
        let name = base_name(source).or_else(|| base_name(name?.to_str()?));
        target.push(name.ok_or_else(|| Failure::new(format!("{source} has no name")))?);
    }
    if metadata.is_file() {
        let file = File::open(source).map_err(unreadable)?;
        let call = Call::FileWrite(FileWrite {
            path: target.to_string_lossy().into_owned(),
            mode: Some(metadata.permissions().mode() & 0o7777),
            owner,
            ..FileWrite::default()
        });
        return transfer(client, &call, Some(file.as_fd()), &mut io::sink(), path);
    }
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(Failure::new(format!("cannot replace {path} in the VM")));
    };
    let parent = match parent.as_os_str().is_empty() {
        true => ".".into(),
        false => parent.to_string_lossy().into_owned(),
    };
    let (read, write) = io::pipe()?;
    let result = std::thread::scope(|scope| {
        let packer = scope.spawn(move || pack(Path::new(source), Path::new(name), write));
        let call = unpack(parent, owner);
        let sent = transfer(client, &call, Some(read.as_fd()), &mut io::sink(), path);
        drop(read);
        (packer.join(), sent)
    });
    match result {
        (Ok(Err(error)), sent) if error.kind() != io::ErrorKind::BrokenPipe || sent.is_ok() => {
            Err(Failure::new(format!("cannot read {source}: {error}")))
        }
        (_, sent) => sent,
    }
}

fn unpack(path: String, owner: Option<String>) -> Call {
    Call::TreeUnpack(TreeUnpack {
        path,
        root: None,
        owner,
    })
}

fn pack(source: &Path, name: &Path, write: impl Write) -> io::Result<()> {
    let mut builder = tar::Builder::new(io::BufWriter::with_capacity(64 << 10, write));
    builder.follow_symlinks(false);
    if fs::symlink_metadata(source)?.is_dir() {
        builder.append_dir_all(name, source)?;
    } else {
        builder.append_path_with_name(source, name)?;
    }
    builder.into_inner()?.flush()
}

fn get(client: &mut Client, path: &str, destination: &str) -> Result<(), Failure> {
    let pack = |name: Option<String>| {
        Call::TreePack(TreePack {
            path: path.into(),
            root: None,
            follow: path.ends_with('/'),
            name,
        })
    };
    if destination == "-" {
        return transfer(client, &pack(None), None, &mut io::stdout(), path);
    }
    let Some(entry) = stat(client, path)? else {
        return Err(Failure::new(format!(
            "{path} in the VM: no such file or directory"
        )));
    };
    let mut target = PathBuf::from(destination);
    if target.is_dir() || destination.ends_with('/') {
        target.push(
            base_name(path)
                .or_else(|| base_name(&entry.path))
                .ok_or_else(|| Failure::new(format!("{path} has no name: give the copy one")))?,
        );
    }
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let unwritable =
        |error: io::Error| Failure::new(format!("cannot write {}: {error}", target.display()));
    if entry.kind == FileKind::File {
        let mut file = tempfile::NamedTempFile::new_in(parent).map_err(unwritable)?;
        let call = Call::FileRead(FileRead {
            path: path.into(),
            ..FileRead::default()
        });
        transfer(client, &call, None, &mut file, path)?;
        let mode = fs::Permissions::from_mode(entry.mode & 0o777);
        file.as_file().set_permissions(mode).map_err(unwritable)?;
        file.persist(&target)
            .map_err(|error| unwritable(error.error))?;
        return Ok(());
    }
    let name = target
        .file_name()
        .ok_or_else(|| Failure::new(format!("{destination} is no name for a copy")))?;
    let call = pack(Some(name.to_string_lossy().into_owned()));
    let (read, mut write) = io::pipe()?;
    std::thread::scope(|scope| {
        let unpacker = scope.spawn(move || {
            let mut archive = tar::Archive::new(io::BufReader::with_capacity(64 << 10, read));
            archive.set_preserve_permissions(true);
            // It keeps what a hostile guest sends below the directory.
            archive.unpack(parent)
        });
        let received = transfer(client, &call, None, &mut write, path);
        drop(write);
        match unpacker.join() {
            Ok(Err(error)) => Err(unwritable(error)),
            _ => received,
        }
    })
}

fn transfer(
    client: &mut Client,
    call: &Call,
    stdin: Option<std::os::fd::BorrowedFd<'_>>,
    stdout: &mut dyn Write,
    path: &str,
) -> Result<(), Failure> {
    guest::transfer(client, call, stdin, stdout)
        .map_err(|error| guest::failure(error, &format!("{path} in the VM")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_after_a_slash_is_no_vm() {
        assert_eq!(in_guest("web:/etc"), Some(("web", "/etc")));
        assert_eq!(in_guest("web:"), Some(("web", "")));
        assert_eq!(in_guest("./a:b"), None);
        assert_eq!(in_guest("/a:b"), None);
        assert_eq!(in_guest("plain"), None);
        assert_eq!(in_guest(":x"), None);
    }
}
