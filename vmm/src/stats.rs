//! KVM's own statistics of a VM or a vCPU, through KVM_GET_STATS_FD (Linux, Documentation/virt/kvm/
//! api.rst, 4.133). `insn_emulation` counts guest-kernel instructions exactly on emulated hosts.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ratoon_vmm_api::VcpuStats;
use vmm_sys_util::ioctl::ioctl;

mod number {
    use vmm_sys_util::ioctl_io_nr;
    // linux/kvm.h: #define KVM_GET_STATS_FD _IO(KVMIO, 0xce)
    ioctl_io_nr!(KVM_GET_STATS_FD, 0xae, 0xce);
}
use number::KVM_GET_STATS_FD;

/// `struct kvm_stats_header`: six 32-bit words.
const HEADER_LEN: usize = 24;
/// `struct kvm_stats_desc` before its name.
const DESC_LEN: usize = 16;
/// More statistics, or longer names, than any kernel has: what a wrong header is refused by.
const MAX_DESCRIPTORS: usize = 1024;
const MAX_NAME_LEN: usize = 256;

/// 1 while a vCPU has halted and nothing has woken it.
const BLOCKING: &str = "blocking";
/// A guest may sleep for a moment in the middle of its work: so many looks one after the other have to find it asleep.
const LOOKS: u32 = 3;
const LOOK_EVERY: Duration = Duration::from_micros(150);

/// A reader of the counters of one VM or vCPU; its layout is read once.
#[derive(Debug)]
pub struct StatsReader {
    file: File,
    counters: Vec<(String, u64)>,
}

impl StatsReader {
    /// Opens the statistics of `of`, a VM's or vCPU's descriptor.
    ///
    /// # Errors
    /// The kernel's, ENOTTY among them when it is older than Linux 5.14.
    pub fn open(of: &impl AsRawFd) -> std::io::Result<Self> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
        let fd = unsafe { ioctl(of, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us, nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        let counters = descriptors(&file)?;
        Ok(Self { file, counters })
    }

    /// One counter now, if it is there.
    fn value(&self, name: &str) -> Option<u64> {
        let (_, offset) = self.counters.iter().find(|(counter, _)| counter == name)?;
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, *offset).ok()?;
        Some(u64::from_le_bytes(value))
    }

    /// The counters now, by name. Histograms give their first bucket only.
    ///
    /// # Errors
    /// When the descriptor cannot be read.
    pub fn read(&self) -> std::io::Result<VcpuStats> {
        let mut stats = VcpuStats::new();
        for (name, offset) in &self.counters {
            let mut value = [0; 8];
            self.file.read_exact_at(&mut value, *offset)?;
            stats.insert(name.clone(), u64::from_le_bytes(value));
        }
        Ok(stats)
    }
}

/// Waits until all vCPUs sleep, as a guest does that has nothing to do, or until `patience` is over. Without such a
/// counter it waits for nothing.
pub(crate) fn wait_until_asleep(vcpus: &[StatsReader], patience: Duration) {
    let end = Instant::now() + patience;
    let mut asleep = 0;
    while asleep < LOOKS && Instant::now() < end {
        let mut counters = vcpus.iter().map(|vcpu| vcpu.value(BLOCKING));
        match counters.all(|counter| counter.is_none_or(|value| value != 0)) {
            true => asleep += 1,
            false => asleep = 0,
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn word(bytes: &[u8], index: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[index * 4..index * 4 + 4]);
    u32::from_le_bytes(word)
}

fn descriptors(file: &File) -> std::io::Result<Vec<(String, u64)>> {
    let mut header = [0; HEADER_LEN];
    file.read_exact_at(&mut header, 0)?;
    // flags, name_size, num_desc, id_offset, desc_offset, data_offset
    let name_len = word(&header, 1) as usize;
    let count = word(&header, 2) as usize;
    let desc_offset = u64::from(word(&header, 4));
    let data_offset = u64::from(word(&header, 5));
    if count > MAX_DESCRIPTORS || name_len > MAX_NAME_LEN {
        return Err(std::io::Error::other(
            "KVM statistics have an unknown layout",
        ));
    }
    let mut table = vec![0; count * (DESC_LEN + name_len)];
    file.read_exact_at(&mut table, desc_offset)?;
    Ok(table
        .chunks_exact(DESC_LEN + name_len)
        .map(|desc| {
            // flags u32, exponent i16, size u16, offset u32, bucket_size u32, name
            let offset = u64::from(word(desc, 2));
            let name = desc[DESC_LEN..].split(|byte| *byte == 0).next();
            let name = String::from_utf8_lossy(name.unwrap_or_default()).into_owned();
            (name, data_offset + offset)
        })
        .collect())
}
