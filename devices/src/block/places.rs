//! Where a layer's clusters are, so that most requests need not ask the format's tables.
//!
//! One number a cluster of the disk: 64 KiB of memory a GiB, of which only what is used is ever
//! touched. An entry is learned when a request has found its cluster, and forgotten before
//! anything that could move it.

use std::ops::Range;

/// Bits of an entry that number a cluster of a file: files of up to 4 TiB.
const CLUSTER_BITS: u32 = 26;
/// Files that an entry can tell apart.
pub(super) const MAX_FILES: usize = 1 << (u32::BITS - CLUSTER_BITS);

/// Where one cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Nobody has asked yet, or the answer is not the other.
    Unknown,
    /// Whole and as it is in this cluster of this file; 0 is the base.
    In {
        /// Counted from the base upwards.
        file: usize,
        /// Counted from the file's beginning.
        cluster: u64,
    },
}

/// The first bytes of a request, all in one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Counted from the base upwards.
    pub(super) file: usize,
    /// Where in the file, in bytes.
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
}

/// The places of all clusters.
#[derive(Debug)]
pub(super) struct Places {
    /// 0: unknown. Others: the file's number and the cluster's, and 1.
    list: Vec<u32>,
    cluster_bytes: u64,
}

impl Places {
    /// All unknown, for a disk of `len_bytes`.
    pub(super) fn new(len_bytes: u64, cluster_bytes: u32) -> Self {
        let cluster_bytes = u64::from(cluster_bytes);
        Self {
            list: vec![0; len_bytes.div_ceil(cluster_bytes) as usize],
            cluster_bytes,
        }
    }

    /// The clusters that a range touches.
    pub(super) fn clusters(&self, offset: u64, len_bytes: u64) -> Range<usize> {
        let end = (offset + len_bytes).div_ceil(self.cluster_bytes) as usize;
        (offset / self.cluster_bytes) as usize..end.min(self.list.len())
    }

    pub(super) fn get(&self, cluster: usize) -> Place {
        match self.list.get(cluster) {
            None | Some(0) => Place::Unknown,
            Some(after) => Place::In {
                file: ((after - 1) >> CLUSTER_BITS) as usize,
                cluster: u64::from((after - 1) & ((1 << CLUSTER_BITS) - 1)),
            },
        }
    }

    /// A place that an entry cannot hold stays unknown.
    pub(super) fn set(&mut self, cluster: usize, place: Place) {
        if let Some(entry) = self.list.get_mut(cluster) {
            *entry = match place {
                // The last cluster of a file is left out: the one after it is another file's.
                Place::In { file, cluster }
                    if file < MAX_FILES && cluster < (1 << CLUSTER_BITS) - 1 =>
                {
                    ((file as u32) << CLUSTER_BITS | cluster as u32) + 1
                }
                _ => 0,
            };
        }
    }

    /// Forgets every cluster that the range touches.
    pub(super) fn forget(&mut self, offset: u64, len_bytes: u64) {
        let clusters = self.clusters(offset, len_bytes);
        if let Some(list) = self.list.get_mut(clusters) {
            list.fill(0);
        }
    }

    /// How much of the range, from its beginning, is in one piece; none if that is not known.
    pub(super) fn piece(&self, offset: u64, len_bytes: u64) -> Option<Piece> {
        let list = self.list.get(self.clusters(offset, len_bytes))?;
        let first = list.first()?.checked_sub(1)?;
        let following = list
            .windows(2)
            .take_while(|pair| pair[1] == pair[0].wrapping_add(1))
            .count() as u64;
        let within = offset % self.cluster_bytes;
        let cluster = u64::from(first & ((1 << CLUSTER_BITS) - 1));
        Some(Piece {
            file: (first >> CLUSTER_BITS) as usize,
            offset: cluster * self.cluster_bytes + within,
            len_bytes: len_bytes.min((following + 1) * self.cluster_bytes - within),
        })
    }

    /// How much of the range, from its beginning, is unknown.
    pub(super) fn unknown_bytes(&self, offset: u64, len_bytes: u64) -> u64 {
        let list = self.list.get(self.clusters(offset, len_bytes));
        let unknown = list.unwrap_or_default();
        let unknown = unknown.iter().take_while(|entry| **entry == 0).count() as u64;
        // A range that is beyond the list is as unknown as can be.
        let end = unknown.max(1) * self.cluster_bytes - offset % self.cluster_bytes;
        len_bytes.min(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 1 << 16;

    fn place(file: usize, cluster: u64) -> Place {
        Place::In { file, cluster }
    }

    fn places() -> Places {
        let mut places = Places::new(6 * CLUSTER + 512, CLUSTER as u32);
        let known = [
            place(0, 0),
            place(0, 1),
            place(1, 2),
            place(1, 3),
            place(2, 4),
            Place::Unknown,
            place(61, 13),
        ];
        for (cluster, place) in known.into_iter().enumerate() {
            places.set(cluster, place);
            assert_eq!(places.get(cluster), place);
        }
        places
    }

    #[test]
    fn a_piece_ends_where_the_file_or_the_order_changes() {
        let places = places();
        let piece = |file, offset, len_bytes| {
            Some(Piece {
                file,
                offset,
                len_bytes,
            })
        };
        let all = 6 * CLUSTER + 512;
        assert_eq!(places.piece(512, 100), piece(0, 512, 100));
        assert_eq!(
            places.piece(512, all - 512),
            piece(0, 512, 2 * CLUSTER - 512)
        );
        let at = 2 * CLUSTER;
        assert_eq!(places.piece(at, all - at), piece(1, at, 2 * CLUSTER));
        assert_eq!(places.piece(at + 1024, 512), piece(1, at + 1024, 512));
        let at = 4 * CLUSTER;
        assert_eq!(places.piece(at, CLUSTER + 1), piece(2, at, CLUSTER));
        let at = 6 * CLUSTER;
        assert_eq!(places.piece(at, 512), piece(61, 13 * CLUSTER, 512));
    }

    #[test]
    fn what_is_unknown_has_no_piece() {
        let mut places = places();
        assert_eq!(places.piece(5 * CLUSTER, 512), None);
        assert_eq!(places.piece(7 * CLUSTER, 512), None);
        assert_eq!(
            places.unknown_bytes(5 * CLUSTER + 1, 3 * CLUSTER),
            CLUSTER - 1
        );
        places.forget(4 * CLUSTER, 1);
        assert_eq!(places.unknown_bytes(4 * CLUSTER, 2 * CLUSTER), 2 * CLUSTER);
        assert_eq!(places.unknown_bytes(4 * CLUSTER, 700), 700);
    }

    #[test]
    fn what_is_forgotten_is_the_clusters_touched_and_no_others() {
        let mut places = places();
        places.forget(2 * CLUSTER - 512, 1024);
        let now = [0, 1, 2, 3].map(|cluster| places.get(cluster));
        let unknown = Place::Unknown;
        assert_eq!(now, [place(0, 0), unknown, unknown, place(1, 3)]);
    }

    #[test]
    fn what_an_entry_cannot_hold_stays_unknown() {
        let mut places = places();
        places.set(0, place(MAX_FILES, 1));
        places.set(1, place(1, (1 << CLUSTER_BITS) - 1));
        assert_eq!([0, 1].map(|c| places.get(c)), [Place::Unknown; 2]);
        places.set(0, place(MAX_FILES - 1, (1 << CLUSTER_BITS) - 2));
        assert_eq!(places.get(0), place(MAX_FILES - 1, (1 << CLUSTER_BITS) - 2));
    }
}
