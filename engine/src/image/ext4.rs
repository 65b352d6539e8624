//! Makes, mends and checks ext4 disks with e2fsprogs, without mounting anything.
//!
//! The features are few on purpose. No journal: a VM's writes go to a layer that is thrown away or
//! frozen whole. No metadata checksums: they cost guest-kernel instructions on every mount and
//! write, and the image has a digest of its own. docs/images.md gives the reasons.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::Progress;
use super::error::{Context, Error, Result};
use super::tool::{DEBUGFS, E2FSCK, MKE2FS};
use super::tree::{Fix, Summary};

/// Free space that a guest gets beyond the content, at least.
pub(super) const FREE_BYTES: u64 = 4 << 30;
/// Sizes are a multiple of ext4's block group (32768 blocks of 4 KiB).
const GROUP_BYTES: u64 = 128 << 20;
/// One inode for so many bytes of disk.
const BYTES_PER_INODE: u64 = 16384;
/// Features, beginning from none, so that the host's mke2fs.conf has no say.
const FEATURES: &str = "none,extent,flex_bg,sparse_super,dir_index,filetype,large_file,huge_file,\
                        dir_nlink,extra_isize,ext_attr";
/// Longest command that debugfs reads from a file (its buffer is 8192 bytes).
const MAX_COMMAND_BYTES: usize = 8000;
/// Piece in which a disk is hashed.
const CHUNK_BYTES: usize = 64 << 10;
/// Where the superblock lies, and how long it is (Documentation/filesystems/ext4/super.rst).
const SUPERBLOCK_OFFSET: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
/// `s_magic` at 0x38.
const MAGIC: u16 = 0xEF53;
/// `s_feature_incompat` bits that 6.12 with our configuration mounts: filetype, recover, meta_bg, extents,
/// 64bit, flex_bg, ea_inode, csum_seed, largedir, inline_data.
const KNOWN_INCOMPAT: u32 =
    0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000;
/// `s_feature_incompat` bit for extents: ext4 as opposed to ext2 and ext3.
const INCOMPAT_EXTENTS: u32 = 0x40;

/// Size of a disk for this content: the content, a tenth for metadata, the free space.
pub(super) fn disk_bytes(content: &Summary) -> u64 {
    let metadata = content.bytes / 20 + content.entries * 256;
    (content.bytes + metadata + FREE_BYTES).next_multiple_of(GROUP_BYTES)
}

/// Makes `disk` from the folder `tree` and applies the fixes.
pub(super) fn make(
    tree: &Path,
    disk: &Path,
    scratch: &Path,
    content: &Summary,
    fixes: &[Fix],
    progress: &dyn Progress,
) -> Result<()> {
    let size = disk_bytes(content);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(disk)
        .at("create", disk)?;
    file.set_len(size).at("size", disk)?;
    drop(file);
    let inodes = (size / BYTES_PER_INODE).max(content.entries + size / BYTES_PER_INODE);
    let mut command = MKE2FS.command()?;
    command
        .args([
            "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-O", FEATURES,
        ])
        .args(["-N", &inodes.to_string()])
        .args(["-E", "lazy_itable_init=0,nodiscard,root_owner=0:0"])
        .arg("-d")
        .arg(tree)
        .arg(disk);
    let (status, output) = MKE2FS.run(command, progress)?;
    if !status.success() {
        return Err(match MKE2FS.failed(status, &output) {
            Error::DiskFull { .. } => Error::DiskFull {
                path: disk.to_path_buf(),
            },
            other => other,
        });
    }
    apply(disk, scratch, fixes, progress)
}

/// Applies what the host's file system could not hold.
fn apply(disk: &Path, scratch: &Path, fixes: &[Fix], progress: &dyn Progress) -> Result<()> {
    if fixes.is_empty() {
        return Ok(());
    }
    let script_path = scratch.join("debugfs.commands");
    let values = scratch.join("values");
    fs::create_dir(&values).at("create", &values)?;
    let mut script = String::new();
    for (number, fix) in fixes.iter().enumerate() {
        write_fix(&mut script, fix, &values, number)?;
    }
    fs::write(&script_path, &script).at("write", &script_path)?;
    let mut command = DEBUGFS.command()?;
    command
        .arg("-w")
        .arg("-f")
        .arg(&script_path)
        .arg(disk)
        .current_dir(scratch);
    let mut running = DEBUGFS.start(command, progress)?;
    // It echoes every command; only what it says on stderr matters.
    std::io::copy(&mut running, &mut std::io::sink()).at("read from", "debugfs".as_ref())?;
    let (status, errors) = running.wait()?;
    // It reports a failed command on stderr and still exits with 0.
    let errors: Vec<String> = errors.into_iter().filter(|line| !line.is_empty()).collect();
    if status.success() && errors.is_empty() {
        Ok(())
    } else {
        Err(DEBUGFS.failed(status, &errors))
    }
}

/// Adds the commands for one fix.
fn write_fix(script: &mut String, fix: &Fix, values: &Path, number: usize) -> Result<()> {
    let before = script.len();
    let path = quoted(&fix.path);
    if let Some(device) = &fix.device {
        let (folder, name) = fix.path.rsplit_once('/').unwrap_or(("", &fix.path));
        let folder = if folder.is_empty() { "/" } else { folder };
        let _ = writeln!(script, "rm {path}");
        let _ = writeln!(script, "cd {}", quoted(folder));
        let _ = writeln!(script, "mknod {} {device}", quoted(name));
        let _ = writeln!(script, "cd /");
    }
    if let Some(mode) = fix.mode {
        let _ = writeln!(script, "sif {path} mode 0{mode:o}");
    }
    if let Some(uid) = fix.uid {
        let _ = writeln!(script, "sif {path} uid {uid}");
    }
    if let Some(gid) = fix.gid {
        let _ = writeln!(script, "sif {path} gid {gid}");
    }
    for (index, (name, value)) in fix.xattrs.iter().enumerate() {
        let file = values.join(format!("{number}-{index}"));
        fs::write(&file, value).at("write", &file)?;
        let _ = writeln!(
            script,
            "ea_set -f values/{number}-{index} {path} {}",
            quoted(name)
        );
    }
    let longest = script[before..]
        .lines()
        .map(str::len)
        .max()
        .unwrap_or_default();
    if longest > MAX_COMMAND_BYTES {
        return Err(Error::RefusedEntry {
            archive: "the image".into(),
            entry: fix.path.clone(),
            reason: "its path is too long for debugfs: shorten it".into(),
        });
    }
    Ok(())
}

/// A word for debugfs: in double quotes, which are doubled inside.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// Digest of a disk: BLAKE3 over its length (u64, little endian) and, for each 64 KiB piece that
/// is not all zeroes, its offset (u64, little endian) and bytes. Holes cost nothing to hash.
pub(super) fn digest(disk: &Path, progress: &dyn Progress) -> Result<String> {
    let mut file = File::open(disk).at("open", disk)?;
    let size = file.metadata().at("stat", disk)?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut offset = 0;
    while offset < size {
        if progress.cancelled() {
            return Err(Error::Cancelled);
        }
        // Skip the hole, if this is one; ENXIO means that no data follow.
        match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => offset = data - data % CHUNK_BYTES as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(Error::io("read", disk, errno.into())),
        }
        let length = (size - offset).min(CHUNK_BYTES as u64) as usize;
        file.seek(SeekFrom::Start(offset)).at("read", disk)?;
        file.read_exact(&mut chunk[..length]).at("read", disk)?;
        if chunk[..length].iter().any(|byte| *byte != 0) {
            hasher.update(&offset.to_le_bytes());
            hasher.update(&chunk[..length]);
        }
        offset += length as u64;
        progress.bytes(offset, Some(size));
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Whether the file carries ext4's magic number.
pub(super) fn has_magic(file: &File) -> bool {
    let mut magic = [0; 2];
    file.read_exact_at(&mut magic, SUPERBLOCK_OFFSET + 0x38)
        .is_ok()
        && u16::from_le_bytes(magic) == MAGIC
}

/// Checks a raw ext4 file's superblock against the file and against what our kernel mounts.
pub(super) fn check_superblock(file: &File, path: &Path) -> Result<()> {
    let bad = |reason: String| Error::BadExt4 {
        path: path.to_path_buf(),
        reason,
    };
    let mut block = [0; SUPERBLOCK_BYTES];
    if file.read_exact_at(&mut block, SUPERBLOCK_OFFSET).is_err() {
        return Err(bad("it is too short to hold a superblock".into()));
    }
    let u16_at = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    let u32_at =
        |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    if u16_at(0x38) != MAGIC {
        return Err(bad(
            "no ext4 magic number; is it a whole disk with partitions?".into(),
        ));
    }
    let log_block_size = u32_at(0x18);
    if log_block_size > 2 {
        return Err(bad(format!(
            "its block size (2^{} bytes) is over the guest's page size of 4096",
            log_block_size.saturating_add(10)
        )));
    }
    let incompat = u32_at(0x60);
    if incompat & INCOMPAT_EXTENTS == 0 {
        return Err(bad(
            "it is ext2 or ext3: convert it with `tune2fs -O extents`".into(),
        ));
    }
    if incompat & !KNOWN_INCOMPAT != 0 {
        return Err(bad(format!(
            "it uses features that the guest kernel lacks (incompat bits {:#x})",
            incompat & !KNOWN_INCOMPAT
        )));
    }
    let high = if incompat & 0x80 != 0 {
        u64::from(u32_at(0x150))
    } else {
        0
    };
    let blocks = (high << 32) | u64::from(u32_at(0x4));
    let claimed = blocks.checked_mul(1024 << log_block_size);
    let actual = file.metadata().at("stat", path)?.len();
    match claimed {
        Some(claimed) if claimed > 0 && claimed <= actual => Ok(()),
        _ => Err(bad(format!(
            "it claims {blocks} blocks of {} bytes but the file has {actual} bytes: it is cut short",
            1024 << log_block_size
        ))),
    }
}

/// Checks a private copy of a raw ext4 file; replays its journal and mends what is safe to mend.
pub(super) fn check_and_mend(disk: &Path, shown: &Path, progress: &dyn Progress) -> Result<()> {
    let mut command = E2FSCK.command()?;
    command.args(["-f", "-p"]).arg(disk);
    let (status, output) = E2FSCK.run(command, progress)?;
    // e2fsck(8): 0 clean, 1 mended, 2 mended and wants a reboot (mounted disks only).
    match status.code() {
        Some(0..=2) => Ok(()),
        _ => Err(Error::BadExt4 {
            path: shown.to_path_buf(),
            reason: format!(
                "e2fsck says: {}; mend a copy with `e2fsck -f`",
                output
                    .join("; ")
                    .replace(&disk.display().to_string(), "disk")
            ),
        }),
    }
}
