//! Time, entropy, hostname and machine id: each checked apart from its being set, so that `wake`
//! can check all before it does the first.
//!
//! How it fails: `bad_request` names what is wrong with the parameter; otherwise the system's
//! reason. `/etc/hostname` and `/etc/hosts` follow the hostname where the root can be written to.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use ratoon_protocol::{EntropyAdd, ErrorReply, HostnameSet, TimeSet};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_settime};

use super::prepared::{Etc, Slot};
use super::{are_file_systems_frozen, bad_request, failed, files, only_init, shown};

/// The system's configuration.
pub(super) const ETC: &str = "/etc";

/// 2000-01-01 and 2200-01-01, in seconds since 1970: a time outside is in another unit.
const TIMES_S: std::ops::Range<u64> = 946_684_800..7_258_118_400;

/// Most bytes of entropy in a call.
const MAX_ENTROPY: usize = 512;

/// A longer /etc/hosts is left alone.
const MAX_HOSTS: usize = 1 << 20;

/// Sets CLOCK_REALTIME.
///
/// # Errors
/// See the module.
pub fn set_time(params: &TimeSet) -> Result<(), ErrorReply> {
    apply_time(time(params.time_us)?)
}

/// A time, checked.
pub(super) fn time(time_us: u64) -> Result<Timespec, ErrorReply> {
    let seconds = time_us / 1_000_000;
    if !TIMES_S.contains(&seconds) {
        return Err(bad_request(format!(
            "time_us {time_us} is not between the years 2000 and 2200: it counts microseconds since 1970"
        )));
    }
    Ok(Timespec {
        tv_sec: seconds as i64,
        tv_nsec: (time_us % 1_000_000 * 1000) as i64,
    })
}

/// Whether the clock says `now` because that is the time. `told` was right when it was sent, and has been under way
/// for a while; so was the one by which the clock was set last, and it is as late.
fn is_right(now: Timespec, told: Timespec) -> bool {
    const LATE_MS: i128 = 250;
    const UNDER_WAY_MS: i128 = 2000;
    let ns = |time: Timespec| i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec);
    (-LATE_MS..UNDER_WAY_MS).contains(&(ns(now) - ns(told)).div_euclid(1_000_000))
}

/// Sets CLOCK_REALTIME if it is not right as it is: a child of a fork has it from the VMM. The call alone is 3000
/// of a wake's 70,000 instructions.
pub(super) fn correct_time(time: Timespec) -> Result<(), ErrorReply> {
    match is_right(rustix::time::clock_gettime(ClockId::Realtime), time) {
        true => Ok(()),
        false => apply_time(time),
    }
}

pub(super) fn apply_time(time: Timespec) -> Result<(), ErrorReply> {
    only_init("the clock")?;
    clock_settime(ClockId::Realtime, time).map_err(|error| failed("cannot set the clock", error))
}

/// Adds entropy and reseeds the kernel's generator with it.
///
/// # Errors
/// See the module.
pub fn add_entropy(params: &EntropyAdd) -> Result<(), ErrorReply> {
    let bytes = entropy(&params.hex, 1)?;
    apply_entropy(open_random()?.as_fd(), &bytes)
}

/// The kernel's random numbers.
pub(super) fn open_random() -> Result<OwnedFd, ErrorReply> {
    const DEVICE: &str = "/dev/urandom";
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(|error| failed(DEVICE, error))
}

/// The bytes of hexadecimal digits, at least `least` of them.
pub(super) fn entropy(hex: &str, least: usize) -> Result<Vec<u8>, ErrorReply> {
    let digits = hex.as_bytes();
    let allowed = least * 2..=MAX_ENTROPY * 2;
    if !digits.len().is_multiple_of(2) || !allowed.contains(&digits.len()) {
        return Err(bad_request(format!(
            "entropy of {} digits: it takes {least} to {MAX_ENTROPY} bytes, two hexadecimal digits each",
            digits.len()
        )));
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let bytes = digits
        .chunks_exact(2)
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?));
    // The digits are a secret: the message does not show them.
    bytes
        .collect::<Option<_>>()
        .ok_or_else(|| bad_request("entropy is not hexadecimal digits alone"))
}

/// `device` is from [`open_random`].
pub(super) fn apply_entropy(device: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), ErrorReply> {
    /// _IOW('R', 0x03, int [2]) and _IO('R', 0x07), linux/random.h.
    const RNDADDENTROPY: u32 = 0x4008_5203;
    const RNDRESEEDCRNG: u32 = 0x5207;
    // struct rand_pool_info: bits to credit, bytes that follow, the bytes.
    let mut info = vec![bytes.len() as u32 * 8, bytes.len() as u32];
    info.extend(bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_ne_bytes(word)
    }));
    // SAFETY: the kernel reads the two numbers and as many bytes as the second says, which `info`
    // has, rounded up; it writes nothing.
    let added = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            RNDADDENTROPY as libc::Ioctl,
            info.as_ptr(),
        )
    };
    if added < 0 {
        return Err(failed("cannot add entropy", last_error()));
    }
    // SAFETY: takes no argument.
    let reseeded = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as libc::Ioctl) };
    match (reseeded < 0).then(last_error) {
        // ENODATA: the generator has had no seed at all yet, and takes this as part of its first.
        None | Some(Errno::NODATA) => Ok(()),
        Some(error) => Err(failed("cannot reseed the random number generator", error)),
    }
}

pub(super) fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Names the machine.
///
/// # Errors
/// See the module.
pub fn set_hostname(params: &HostnameSet) -> Result<(), ErrorReply> {
    check_hostname(&params.hostname)?;
    apply_hostname(&params.hostname, &mut Etc::default())
}

/// Letters, digits, `-` and `.`, as in RFC 1123: each part begins and ends with a letter or digit.
pub(super) fn check_hostname(hostname: &str) -> Result<(), ErrorReply> {
    let is_part = |part: &str| {
        let bytes = part.as_bytes();
        let inner = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
        bytes.iter().all(inner)
            && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
            && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
    };
    if (1..=63).contains(&hostname.len()) && hostname.split('.').all(is_part) {
        return Ok(());
    }
    Err(bad_request(format!(
        "hostname `{}` is not 1 to 63 letters, digits, `-` and `.` with a letter or digit at both ends of each part",
        shown(hostname)
    )))
}

/// `open`: files that are written in place.
pub(super) fn apply_hostname(hostname: &str, open: &mut Etc) -> Result<(), ErrorReply> {
    only_init("the hostname")?;
    writable_root()?;
    let old = rustix::system::uname();
    let old = old.nodename().to_string_lossy();
    rustix::system::sethostname(hostname.as_bytes())
        .map_err(|error| failed("cannot set the hostname", error))?;
    if old == hostname {
        return Ok(());
    }
    write_hostname(Path::new(ETC), &old, hostname, open)
}

/// A frozen file system would hold the loop for ever, and with it the call that thaws.
pub(super) fn writable_root() -> Result<(), ErrorReply> {
    if are_file_systems_frozen() {
        return Err(failed(
            "the file systems are frozen, thaw them first",
            Errno::BUSY,
        ));
    }
    Ok(())
}

/// At boot: the files of an image say what the machine is called.
///
/// # Errors
/// See the module.
pub fn name_files(hostname: &str) -> Result<(), ErrorReply> {
    let path = Path::new(ETC).join("hostname");
    match files::read(&path, 256) {
        // An image that says nothing is left so.
        Ok(Some(old)) if !old.is_empty() && old.trim() != hostname => {
            write_hostname(Path::new(ETC), old.trim(), hostname, &mut Etc::default())
        }
        _ => Ok(()),
    }
}

fn write_hostname(etc: &Path, old: &str, new: &str, open: &mut Etc) -> Result<(), ErrorReply> {
    let write = |name: &str, text: String, slot: Option<&mut Slot>| {
        let path = etc.join(name);
        let written = match slot {
            Some(slot) => slot.put(text.as_bytes()),
            None => files::replace(&path, text.as_bytes(), 0o644),
        };
        match written {
            // The machine has the name all the same.
            Ok(()) | Err(Errno::ROFS | Errno::NOENT) => Ok(()),
            Err(error) => Err(failed(path.display(), error)),
        }
    };
    write("hostname", format!("{new}\n"), open.hostname.as_mut())?;
    let path = etc.join("hosts");
    let text = match &open.hosts {
        Some(slot) => Ok(String::from_utf8(slot.text().to_vec()).ok()),
        None => files::read(&path, MAX_HOSTS),
    };
    match text {
        Ok(Some(text)) => {
            let renamed = renamed(&text, old, new);
            if renamed == text {
                Ok(())
            } else {
                write("hosts", renamed, open.hosts.as_mut())
            }
        }
        Ok(None) => Ok(()),
        Err(error) => Err(failed(path.display(), error)),
    }
}

/// /etc/hosts with a machine's new name in the place of the old; on a line of its own if it is
/// nowhere. `localhost` is every machine's.
fn renamed(text: &str, old: &str, new: &str) -> String {
    let mut out = String::new();
    let mut has_new = false;
    if text.is_empty() {
        out.push_str("127.0.0.1\tlocalhost\n::1\tlocalhost\n");
    }
    for line in text.split_inclusive('\n') {
        let (body, comment) = line.split_at(line.find('#').unwrap_or(line.len()));
        let mut words = 0;
        for piece in body.split_inclusive(char::is_whitespace) {
            let word = piece.trim_end_matches(char::is_whitespace);
            words += usize::from(!word.is_empty());
            // The first word is the address.
            let is_name = words > 1 && !word.is_empty();
            if is_name && word == old && old != "localhost" {
                out.push_str(new);
                out.push_str(&piece[word.len()..]);
                has_new = true;
            } else {
                has_new |= is_name && word == new;
                out.push_str(piece);
            }
        }
        out.push_str(comment);
    }
    if !has_new {
        if !out.ends_with('\n') {
            out.push('\n');
        }
        out.push_str(&format!("127.0.1.1\t{new}\n"));
    }
    out
}

/// 32 hexadecimal digits, not all 0 (machine-id(5)); in lower case.
pub(super) fn machine_id(text: &str) -> Result<String, ErrorReply> {
    let is_hex = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_hex || text.bytes().all(|byte| byte == b'0') {
        return Err(bad_request(format!(
            "machine id `{}` is not 32 hexadecimal digits, not all of them 0",
            shown(text)
        )));
    }
    Ok(text.to_ascii_lowercase())
}

/// `open`: the file, to be written in place.
pub(super) fn apply_machine_id(id: &str, open: &mut Etc) -> Result<(), ErrorReply> {
    only_init("the machine id")?;
    writable_root()?;
    let path = Path::new(ETC).join("machine-id");
    let text = format!("{id}\n");
    let written = match &mut open.machine_id {
        Some(slot) => slot.put(text.as_bytes()),
        None => files::replace(&path, text.as_bytes(), 0o444),
    };
    written.map_err(|error| failed(path.display(), error))
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
