//! Frozen layers: what was written stays as it was, whoever goes on from it.

use std::os::fd::AsRawFd;

use super::backends::{agrees_with_a_model, allocated};
use super::*;

/// A disk that is frozen again and again.
struct Chain {
    directory: TempDir,
    base: PathBuf,
    frozen: Vec<PathBuf>,
    top: PathBuf,
    backend: Box<dyn Backend>,
    model: Vec<u8>,
}

impl Chain {
    fn new() -> Self {
        let (directory, base, model) = disk();
        let top = directory.path().join("layer-0");
        let backend = open(&base, false, &[], Some(&top)).unwrap();
        Self {
            directory,
            base,
            frozen: Vec::new(),
            top,
            backend,
            model,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Whether a layer was frozen.
    fn freeze(&mut self) -> bool {
        let names = (1..).map(|number| self.path(&format!("layer-{number}")));
        let next = names.into_iter().find(|path| !path.exists()).unwrap();
        self.backend.prepare_layer(&next).unwrap();
        self.backend.write_back().unwrap();
        let is_frozen = self.backend.push_layer().unwrap();
        if is_frozen {
            self.frozen.push(std::mem::replace(&mut self.top, next));
        }
        is_frozen
    }

    /// Another VM, over what was frozen.
    fn child(&self, name: &str) -> Box<dyn Backend> {
        open(&self.base, false, &self.frozen, Some(&self.path(name))).unwrap()
    }
}

#[test]
fn every_child_goes_on_from_where_its_layer_was_frozen() {
    let mut chain = Chain::new();
    let mut children = Vec::new();
    for round in 0..3 {
        agrees_with_a_model(chain.backend.as_mut(), &mut chain.model, round);
        assert!(chain.freeze());
        let child = chain.child(&format!("child-{round}"));
        children.push((child, chain.model.clone()));
    }
    let files: Vec<Vec<u8>> = chain.frozen.iter().map(|f| fs::read(f).unwrap()).collect();
    agrees_with_a_model(chain.backend.as_mut(), &mut chain.model, 99);
    for (round, (child, model)) in children.iter_mut().enumerate() {
        assert!(read(child.as_mut(), 0, model.len()) == *model, "{round}");
        agrees_with_a_model(child.as_mut(), model, 100 + round as u64);
    }
    for (path, before) in chain.frozen.iter().zip(files) {
        assert!(fs::read(path).unwrap() == before, "{path:?} was written");
    }
    // Opened again, all of it is there.
    chain.backend.flush().unwrap();
    chain.backend = open(&chain.base, true, &[], None).unwrap();
    let mut again = open(&chain.base, false, &chain.frozen, Some(&chain.top)).unwrap();
    assert!(read(again.as_mut(), 0, chain.model.len()) == chain.model);
}

#[test]
fn a_top_that_nobody_wrote_to_is_not_frozen() {
    let mut chain = Chain::new();
    assert!(!chain.freeze());
    assert!(!chain.path("layer-1").exists());
    write(chain.backend.as_mut(), 0, &[1; 512]);
    assert!(chain.freeze());
    assert!(!chain.freeze());
    assert_eq!(chain.frozen.len(), 1);
    assert_eq!(read(chain.backend.as_mut(), 0, 512), [1; 512]);
}

#[test]
fn a_frozen_layer_can_be_written_by_nobody() {
    let mut chain = Chain::new();
    write(chain.backend.as_mut(), 0, &[1; 512]);
    assert!(chain.freeze());
    let refused = |frozen: &[PathBuf], top: &Path| match open(&chain.base, false, frozen, Some(top))
    {
        Ok(_) => panic!("{top:?} was opened"),
        Err(error) => error,
    };
    // The VM that goes on has it, and so may others, but as what they read.
    let frozen = &chain.frozen[0];
    assert!(matches!(refused(&[], frozen), OpenError::Locked { path, .. } if path == *frozen));
    let error = refused(&chain.frozen, frozen);
    assert!(matches!(&error, OpenError::LayerIsFrozen { path } if path == frozen));
    // The top is the VM's own.
    let error = refused(std::slice::from_ref(&chain.top), &chain.path("new"));
    assert!(matches!(error, OpenError::Locked { path, .. } if path == chain.top));
}

#[test]
fn a_missing_or_foreign_layer_is_named() {
    let mut chain = Chain::new();
    write(chain.backend.as_mut(), 0, &[1; 512]);
    assert!(chain.freeze());
    let new = chain.path("new");
    let refused = |frozen: PathBuf| match open(&chain.base, false, &[frozen], Some(&new)) {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    };
    let none = chain.path("none");
    assert!(matches!(refused(none.clone()), OpenError::Missing { path } if path == none));
    let error = refused(chain.base.clone());
    assert!(matches!(error, OpenError::LayerFormat { path, .. } if path == chain.base));
    let small = chain.path("small");
    fs::write(&small, vec![0; 1 << 20]).unwrap();
    let foreign = chain.path("foreign");
    drop(open(&small, false, &[], Some(&foreign)).unwrap());
    let error = refused(foreign.clone());
    assert!(matches!(error, OpenError::LayerMismatch { path, .. } if path == foreign));
    assert!(!new.exists(), "no layer over what is not there");
}

#[test]
fn merged_layers_are_what_they_were_together() {
    let mut chain = Chain::new();
    for round in 0..3 {
        agrees_with_a_model(chain.backend.as_mut(), &mut chain.model, round);
        assert!(chain.freeze());
    }
    let merged = chain.path("merged");
    merge(&chain.frozen, 0, &chain.base, &merged, &mut || true).unwrap();
    let mut child = open(&chain.base, false, &[merged], Some(&chain.path("x"))).unwrap();
    assert!(read(child.as_mut(), 0, chain.model.len()) == chain.model);
    agrees_with_a_model(child.as_mut(), &mut chain.model.clone(), 9);

    let stopped = chain.path("stopped");
    let error = merge(&chain.frozen, 0, &chain.base, &stopped, &mut || false).unwrap_err();
    assert!(matches!(&error, OpenError::LayerCreate { path, .. } if *path == stopped));
    assert!(!stopped.exists());
}

#[test]
fn a_disk_goes_on_over_merged_layers_and_no_byte_changes() {
    for seed in 0..2 {
        let mut chain = Chain::new();
        let mut random = Seeded(seed);
        for round in 0..10 {
            agrees_with_a_model(chain.backend.as_mut(), &mut chain.model, seed * 100 + round);
            assert!(chain.freeze());
            if round % 3 != 2 {
                continue;
            }
            let end = chain.frozen.len();
            let first = random.below(end as u64 - 1) as usize;
            let merged = chain.path(&format!("merged-{round}"));
            merge(&chain.frozen, first, &chain.base, &merged, &mut || true).unwrap();
            // What it writes meanwhile is in its top.
            let bytes = random.bytes(100 * 512);
            write(chain.backend.as_mut(), 512, &bytes);
            chain.model[512..512 + bytes.len()].copy_from_slice(&bytes);
            let range = first..end;
            chain
                .backend
                .replace_layers(range.clone(), &merged)
                .unwrap();
            chain.frozen.splice(range, [merged]);
            assert!(read(chain.backend.as_mut(), 0, chain.model.len()) == chain.model);
        }
        agrees_with_a_model(chain.backend.as_mut(), &mut chain.model, seed);
        assert!(chain.freeze());
        let mut child = chain.child("child");
        assert!(
            read(child.as_mut(), 0, chain.model.len()) == chain.model,
            "{seed}"
        );
    }
}

#[test]
fn merged_layers_in_the_middle_hide_and_show_what_they_did() {
    let mut chain = Chain::new();
    let cluster = 65536_usize;
    let fill = |backend: &mut dyn Backend, first: usize, count: usize, byte: u8| {
        write(
            backend,
            (first * cluster) as u64,
            &vec![byte; count * cluster],
        );
    };
    fill(chain.backend.as_mut(), 0, 8, 1);
    assert!(chain.freeze());
    fill(chain.backend.as_mut(), 2, 2, 2);
    chain
        .backend
        .write_zeroes(4 * cluster as u64, 2 * cluster as u64, true)
        .unwrap();
    assert!(chain.freeze());
    fill(chain.backend.as_mut(), 3, 1, 3);
    assert!(chain.freeze());
    fill(chain.backend.as_mut(), 0, 1, 4);
    assert!(chain.freeze());
    let merged = chain.path("merged");
    merge(&chain.frozen[..3], 1, &chain.base, &merged, &mut || true).unwrap();
    let error = chain.backend.replace_layers(1..4, &chain.base);
    assert!(error.is_err(), "it is no layer");
    let error = chain.backend.replace_layers(1..5, &merged);
    assert!(error.is_err(), "the top is not frozen");
    chain.backend.replace_layers(1..3, &merged).unwrap();
    chain.frozen.splice(1..3, [merged]);
    let wanted = [4, 1, 2, 3, 0, 0, 1, 1];
    let mut child = chain.child("child");
    for (number, byte) in wanted.into_iter().enumerate() {
        let at = (number * cluster) as u64;
        for backend in [chain.backend.as_mut(), child.as_mut()] {
            assert_eq!(read(backend, at, cluster), vec![byte; cluster], "{number}");
        }
    }
}

#[test]
fn what_only_the_base_has_is_not_in_merged_layers() {
    let mut chain = Chain::new();
    let mut sizes = Vec::new();
    for round in 0..2 {
        write(chain.backend.as_mut(), 4096, &[round; 4096]);
        assert!(chain.freeze());
        sizes.push(allocated(&chain.frozen[round as usize]));
    }
    let merged = chain.path("merged");
    merge(&chain.frozen, 0, &chain.base, &merged, &mut || true).unwrap();
    assert!(allocated(&merged) <= sizes[0], "{sizes:?}");
}

#[test]
fn so_many_layers_and_no_more() {
    let mut chain = Chain::new();
    for round in 0..MAX_FROZEN as u64 {
        write(chain.backend.as_mut(), round * 65536, &[round as u8; 512]);
        assert!(chain.freeze());
    }
    write(chain.backend.as_mut(), 0, &[200; 512]);
    for round in 1..MAX_FROZEN as u64 {
        let bytes = read(chain.backend.as_mut(), round * 65536, 512);
        assert_eq!(bytes, [round as u8; 512]);
    }
    let error = chain.backend.prepare_layer(&chain.path("last"));
    assert!(matches!(error, Err(OpenError::TooManyLayers { .. })));
    assert_eq!(read(chain.backend.as_mut(), 0, 512), [200; 512]);
}

#[test]
fn what_is_discarded_after_a_freeze_frees_the_top_and_not_what_is_frozen() {
    let mut chain = Chain::new();
    let half = DISK_BYTES / 2;
    write(chain.backend.as_mut(), 0, &vec![7; half as usize]);
    assert!(chain.freeze());
    let empty = allocated(&chain.top);
    write(chain.backend.as_mut(), 0, &vec![8; half as usize]);
    chain.backend.flush().unwrap();
    assert!(allocated(&chain.top) >= half);
    chain.backend.discard(0, half).unwrap();
    chain.backend.flush().unwrap();
    let kept = allocated(&chain.top) - empty;
    assert!(kept <= 256 << 10, "{kept} bytes");
    let bytes = read(chain.backend.as_mut(), 0, half as usize);
    assert!(bytes.iter().all(|byte| *byte == 0));
    let mut child = chain.child("child");
    let bytes = read(child.as_mut(), 0, half as usize);
    assert!(bytes.iter().all(|byte| *byte == 7));
}

#[test]
fn a_disk_is_made_of_inherited_descriptors_as_well() {
    let mut chain = Chain::new();
    write(chain.backend.as_mut(), 512, &[3; 512]);
    assert!(chain.freeze());
    let files = [
        fs::File::open(&chain.base).unwrap(),
        fs::File::open(&chain.frozen[0]).unwrap(),
        fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(chain.path("top"))
            .unwrap(),
    ];
    let [base, frozen, top] = files
        .each_ref()
        .map(|file| PathBuf::from(format!("/dev/fd/{}", file.as_raw_fd())));
    let mut backend = open(&base, false, std::slice::from_ref(&frozen), Some(&top)).unwrap();
    assert_eq!(read(backend.as_mut(), 512, 512), [3; 512]);
    write(backend.as_mut(), 512, &[4; 512]);
    backend.flush().unwrap();
    drop((backend, files));
    let mut again = chain.child("top");
    assert_eq!(read(again.as_mut(), 512, 512), [4; 512]);
    // A number that is open for reading only, and one that is not open.
    let read_only = fs::File::open(chain.path("top")).unwrap();
    let path = PathBuf::from(format!("/dev/fd/{}", read_only.as_raw_fd()));
    let refused = open(&chain.base, false, &chain.frozen, Some(&path));
    assert!(matches!(
        refused.err(),
        Some(OpenError::Permission { writable: true, .. })
    ));
    let refused = open(Path::new("/dev/fd/1048575"), true, &[], None);
    assert!(matches!(refused.err(), Some(OpenError::Io { .. })));
}
