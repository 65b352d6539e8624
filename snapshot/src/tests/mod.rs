//! Tests of whole snapshots.

mod damage;
mod formats;
mod memories;
mod stores;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::*;

/// 3 MiB of memory in two regions.
const REGIONS: [Region; 2] = [
    Region {
        guest_address: 0,
        length: 1 << 20,
    },
    Region {
        guest_address: 4 << 30,
        length: 2 << 20,
    },
];
const MEMORY_BYTES: u64 = 3 << 20;

/// The same numbers on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Writes over some pages: noise, text, zeroes. Gives what was written as runs.
    fn scribble(&mut self, memory: &mut [u8], times: u64) -> Vec<Run> {
        let mut pages: Vec<u64> = Vec::new();
        for _ in 0..times {
            let page = self.below(memory.len() as u64 / PAGE_BYTES);
            let at = (page * PAGE_BYTES) as usize;
            let kind = self.below(3);
            for (place, byte) in memory[at..at + PAGE_BYTES as usize].iter_mut().enumerate() {
                *byte = match kind {
                    0 => self.next() as u8,
                    1 => b"ratoon"[place % 6],
                    _ => 0,
                };
            }
            pages.push(page);
        }
        pages.sort_unstable();
        pages.dedup();
        let run = |page: u64| Run {
            offset: page * PAGE_BYTES,
            length: PAGE_BYTES,
        };
        pages.into_iter().map(run).collect()
    }
}

struct Lab {
    folder: TempDir,
    store: Store,
    random: Random,
    memory: Vec<u8>,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("snapshots")).unwrap();
        let mut random = Random(0x5eed);
        let mut memory = vec![0; MEMORY_BYTES as usize];
        random.scribble(&mut memory, 200);
        Self {
            folder,
            store,
            random,
            memory,
        }
    }

    /// The VM's memory as a sparse file.
    fn memory_file(&self) -> File {
        let file = tempfile::tempfile_in(self.folder.path()).unwrap();
        file.set_len(MEMORY_BYTES).unwrap();
        for (page, bytes) in self.memory.chunks(4096).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(bytes, page as u64 * 4096).unwrap();
            }
        }
        file
    }

    /// Writes the memory as it is now.
    fn snapshot(&self, name: &str, kind: MemoryKind) -> Result<Snapshot> {
        let mut writer = self.store.begin()?;
        let file = self.memory_file();
        let runs = populated(&file)?;
        match kind {
            MemoryKind::Plain => writer.memory_plain(&REGIONS, &file, &runs, &Quiet)?,
            MemoryKind::Chunks => {
                writer.memory_chunks(&REGIONS, &file, &runs, ChunkOptions::default(), &Quiet)?
            }
        };
        writer.state(b"the state of the VM")?;
        let disk = tempfile::tempfile_in(self.folder.path()).unwrap();
        disk.write_all_at(b"a layer's end", 100_000).unwrap();
        writer.layer("root", "root-0.qcow2", &disk, &Quiet)?;
        writer.finish(about(None), Some(name), None)
    }

    /// A snapshot as one file.
    fn exported(&self, name: &str) -> PathBuf {
        let bundle = self.folder.path().join("bundle.tar");
        self.store.export(name, &bundle, &Quiet).unwrap();
        bundle
    }

    /// Changes some pages, then writes those alone.
    fn difference(&mut self, name: &str, parent: &Snapshot) -> Result<Snapshot> {
        let changed = self.random.scribble(&mut self.memory, 100);
        let mut writer = self.store.begin()?;
        let base = parent.manifest.memory.blake3;
        writer.memory_difference(&REGIONS, &self.memory.as_slice(), &changed, base, &Quiet)?;
        writer.state(b"the state of the child")?;
        writer.finish(about(Some(parent.id)), Some(name), None)
    }

    /// All of a snapshot's memory.
    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let image = self.store.memory(&self.store.get(name)?)?;
        let mut bytes = vec![9; image.bytes as usize];
        image.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Entries of the store that are not there for good.
    fn leftovers(&self) -> Vec<String> {
        leftovers(self.store.root())
    }
}

fn leftovers(root: &Path) -> Vec<String> {
    let mut left = Vec::new();
    for folder in [root.to_path_buf(), root.join("names")] {
        for entry in fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.starts_with(".tmp-") {
                left.push(name);
            }
        }
    }
    left
}

fn about(parent: Option<Digest>) -> About {
    About {
        cpu: Cpu {
            vendor: "GenuineIntel".into(),
            features: vec!["1.ecx=fffa3203".into(), "7.ebx=219c95a9".into()],
        },
        kernel: Some(Digest::of(b"kernel")),
        image: Some(Digest::of(b"image")),
        runtime: Some(Digest::of(b"runtime")),
        vcpus: 2,
        memory_mib: 3,
        parent,
        labels: [("who".to_owned(), "me".to_owned())].into(),
    }
}
