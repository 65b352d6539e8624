use super::super::{again, ahead, create, file_of, first, lay_over, restore};
use super::*;

const PAGES: u64 = 64 << 8;
const MIB: u64 = 1 << 20;

/// Numbers that are the same in each run (splitmix64).
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

/// The first byte of each page.
fn firsts(memory: &GuestMemoryMmap) -> Vec<u8> {
    use vm_memory::{Bytes, GuestAddress};
    let mut all = vec![0; (PAGES * PAGE) as usize];
    memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    all.chunks(PAGE as usize)
        .map(|page| {
            // What was written fills its page: no part of another one.
            assert!(page.iter().all(|byte| *byte == page[0]));
            page[0]
        })
        .collect()
}

fn child(layers: &[Layer]) -> GuestMemoryMmap {
    let memory = restore(64, layers).unwrap();
    lay_over(&memory, layers).unwrap();
    memory
}

/// A layer of random runs; some are holes: what was freed.
fn layer(random: &mut Seeded, model: &mut [u8]) -> Layer {
    let file = memfd("test", PAGES * PAGE).unwrap();
    let mut runs = Vec::new();
    for _ in 0..=random.below(12) {
        let first = random.below(PAGES - 40);
        let count = 1 + random.below(40);
        let byte = random.below(256) as u8;
        for page in first..first + count {
            // A part of it is zero.
            let byte = if page % 5 == 0 { 0 } else { byte };
            let bytes = [byte; PAGE as usize];
            if byte == 0 {
                use rustix::fs::{FallocateFlags, fallocate};
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&*file, hole, page * PAGE, PAGE).unwrap();
            } else {
                file.write_all_at(&bytes, page * PAGE).unwrap();
            }
            model[page as usize] = byte;
        }
        runs.push(Run {
            offset: first * PAGE,
            len: count * PAGE,
        });
    }
    Layer {
        file,
        runs: joined(runs),
        packed: false,
        freezes: 1,
    }
}

fn base(random: &mut Seeded, model: &mut [u8]) -> Layer {
    let runs = vec![Run {
        offset: 0,
        len: PAGES * PAGE,
    }];
    Layer {
        runs,
        ..layer(random, model)
    }
}

#[test]
fn merged_and_pruned_layers_are_what_they_were_together() {
    for seed in 0..12 {
        let mut random = Seeded(seed);
        let mut model = vec![0; PAGES as usize];
        let mut layers = vec![base(&mut random, &mut model)];
        let mut freezes = 1;
        for _ in 0..24 {
            layers.push(layer(&mut random, &mut model));
            freezes += 1;
            if random.below(2) == 0 {
                prune(&mut layers);
            }
            if random.below(4) == 0 {
                let start = 1 + random.below(layers.len() as u64 - 1) as usize;
                let end = start + 1 + random.below((layers.len() - start) as u64) as usize;
                let made_of = layers[start..end].to_vec();
                let merged = merge(&layers, start..end, PAGES * PAGE).unwrap();
                // A freeze while it was merged.
                if random.below(2) == 0 {
                    layers.push(layer(&mut random, &mut model));
                    freezes += 1;
                    prune(&mut layers);
                }
                let was = layers
                    .iter()
                    .any(|layer| made_of.iter().any(|it| Arc::ptr_eq(&it.file, &layer.file)));
                assert_eq!(install(&mut layers, &made_of, merged), was);
            }
        }
        let sum: u32 = layers.iter().map(|layer| layer.freezes).sum();
        assert_eq!(sum, freezes, "seed {seed}");
        assert!(firsts(&child(&layers)) == model, "seed {seed}");
    }
}

#[test]
fn a_layer_that_is_hidden_goes_and_what_is_newer_than_it_is_told_apart() {
    let mut random = Seeded(1);
    let mut model = vec![0; PAGES as usize];
    let base = base(&mut random, &mut model);
    let mut some = layer(&mut random, &mut model);
    let runs = [0, 20 * PAGE].map(|offset| Run { offset, len: PAGE });
    some.runs = runs.to_vec();
    let mut layers = vec![base, some.clone(), some.clone(), some];
    layers[3].runs.truncate(1);
    let hidden = layers[2].runs[1..].to_vec();
    prune(&mut layers);
    let freezes: Vec<u32> = layers.iter().map(|layer| layer.freezes).collect();
    assert_eq!(freezes, [1, 2, 1]);
    assert_eq!(layers[1].runs, hidden);
    let within = |depth| ratoon_vmm_api::layers_within(freezes.iter().copied(), depth);
    assert_eq!([0, 1, 2, 3, 4].map(within), [0, 1, 1, 2, 3]);
}

#[test]
fn packed_layers_of_a_snapshot_stay_and_count() {
    let mut random = Seeded(7);
    let mut model = vec![0; PAGES as usize];
    let mut layers = vec![base(&mut random, &mut model)];
    let file = memfd("test", 2 * PAGE).unwrap();
    file.write_all_at(&[9; 2 * PAGE as usize], 0).unwrap();
    let runs = [(0, PAGE), (100 * PAGE, PAGE)].map(|(offset, len)| Run { offset, len });
    layers.push(Layer {
        file,
        runs: runs.to_vec(),
        packed: true,
        freezes: 1,
    });
    (model[0], model[100]) = (9, 9);
    for _ in 0..5 {
        layers.push(layer(&mut random, &mut model));
    }
    prune(&mut layers);
    assert_eq!(layers[1].runs, runs);
    assert_eq!(floor(&layers), 2);
    let range = plan_layers(&layers, 1);
    assert_eq!(range, 2..layers.len());
    let made_of = layers[range.clone()].to_vec();
    let merged = merge(&layers, range, PAGES * PAGE).unwrap();
    assert!(install(&mut layers, &made_of, merged));
    assert_eq!(layers.len(), 3);
    assert!(firsts(&child(&layers)) == model);
}

#[test]
fn the_youngest_are_merged_down_to_one_that_is_much_larger() {
    assert_eq!(plan(&[1000, 10, 10, 10], 8), 1..4);
    assert_eq!(plan(&[1000, 100, 10, 1], 8), 3..4);
    // So many have to go.
    assert_eq!(plan(&[1000, 100, 10, 1], 2), 1..4);
    assert_eq!(plan(&[5, 5, 5], 8), 0..3);
    assert_eq!(plan(&[], 8), 0..0);
    // Equal layers that come one by one: what is copied grows with their number only by its logarithm.
    let (mut sizes, mut copied) = (Vec::new(), 0);
    for _ in 0..1024 {
        sizes.push(1);
        if sizes.len() >= 8 {
            let range = plan(&sizes, 4);
            let sum: u64 = sizes.drain(range).sum();
            copied += sum;
            sizes.push(sum);
        }
        assert!(sizes.len() <= 8);
    }
    assert!(copied <= 10 * 1024, "{copied}");
}

#[test]
fn a_running_machine_moves_over_and_keeps_what_it_wrote() {
    use vm_memory::{Bytes, GuestAddress};
    let memory = create(64).unwrap();
    let file = file_of(&memory);
    let fill = |at: u64, byte: u8| {
        let bytes = [byte; PAGE as usize];
        memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    };
    for page in 0..1024 {
        fill(page * PAGE, 1);
    }
    let (layer, aside) = first(&memory, &file).unwrap();
    drop(aside);
    let mut layers = vec![layer];
    for round in 2..6_u8 {
        for page in 0..100 {
            fill((u64::from(round) * 50 + page) * PAGE, round);
        }
        layers.push(again(&memory, ahead(&memory).unwrap(), &[]).unwrap().0);
        prune(&mut layers);
    }
    let before = firsts(&memory);
    let range = 1..layers.len();
    let made_of = layers[range.clone()].to_vec();
    let merged = merge(&layers, range, 64 * MIB).unwrap();
    assert!(install(&mut layers, &made_of, merged));
    assert_eq!((layers.len(), layers[1].freezes), (2, 4));
    // Written meanwhile, and not in any layer.
    fill(120 * PAGE, 9);
    fill(320 * PAGE, 9);
    move_over(&memory, &layers[1].file, &layers[1].runs, &[]).unwrap();
    let mut after = before.clone();
    (after[120], after[320]) = (9, 9);
    assert!(firsts(&memory) == after);
    assert!(firsts(&child(&layers)) == before);
    // The next freeze has what was written, and then nobody has the old files any more.
    layers.push(again(&memory, ahead(&memory).unwrap(), &[]).unwrap().0);
    assert!(firsts(&child(&layers)) == after);
    assert!(firsts(&memory) == after);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for old in made_of {
        use std::os::unix::fs::MetadataExt;
        let inode = format!(" {} ", old.file.metadata().unwrap().ino());
        assert!(!maps.contains(&inode), "it is mapped still");
    }
}

#[test]
fn what_a_guest_gave_back_reads_as_zero_when_its_machine_has_moved_over() {
    use ratoon_devices::balloon::Reclaim;
    use vm_memory::{Bytes, GuestAddress};
    let memory = create(64).unwrap();
    let free = super::super::FreeMemory::new(false);
    let (layer, aside) = first(&memory, &file_of(&memory)).unwrap();
    drop((aside, free.take()));
    let mut layers = vec![layer];
    for round in 1..4 {
        let bytes = vec![round; 4 * MIB as usize];
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        layers.push(
            again(&memory, ahead(&memory).unwrap(), &free.take())
                .unwrap()
                .0,
        );
    }
    free.reclaim(&memory, GuestAddress(0), 2 * MIB).unwrap();
    let wanted = |page: u64| if page < 512 { 0 } else { 3 };
    let made_of = layers[1..4].to_vec();
    let merged = merge(&layers, 1..4, 64 * MIB).unwrap();
    assert!(install(&mut layers, &made_of, merged));
    let (file, runs) = (&layers[1].file, &layers[1].runs);
    move_over(&memory, file, runs, &free.runs()).unwrap();
    for (page, byte) in (0..).zip(&firsts(&memory)[..1024]) {
        assert_eq!(*byte, wanted(page), "page {page}");
    }
    layers.push(
        again(&memory, ahead(&memory).unwrap(), &free.take())
            .unwrap()
            .0,
    );
    for (page, byte) in (0..).zip(&firsts(&child(&layers))[..1024]) {
        assert_eq!(*byte, wanted(page), "page {page}");
    }
}
