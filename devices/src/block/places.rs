//! Where a layer's clusters are, so that most requests need not ask the format's tables.
//!
//! One number a cluster of the disk: 64 KiB of memory a GiB, of which only what is used is ever
//! touched. An entry is learned when a request has found its cluster, and forgotten before
//! anything that could move it.

use std::ops::Range;

/// Where one cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Nobody has asked yet, or the answer is not one of the others.
    Unknown,
    /// In the base, where it is on the disk.
    Base,
    /// In the layer's file, in this cluster of it, and for this layer alone.
    Layer(u32),
}

/// Where a request's bytes are, when they are in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    /// In the base, at the same offset.
    Base,
    /// In the layer's file, at this offset in bytes.
    Layer(u64),
}

/// The places of all clusters.
#[derive(Debug)]
pub(super) struct Places {
    /// 0: unknown. 1: base. Others: the layer's cluster and 1; its cluster 0 is the header.
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
            Some(1) => Place::Base,
            Some(after) => Place::Layer(after - 1),
        }
    }

    pub(super) fn set(&mut self, cluster: usize, place: Place) {
        if let Some(entry) = self.list.get_mut(cluster) {
            *entry = match place {
                Place::Unknown | Place::Layer(0 | u32::MAX) => 0,
                Place::Base => 1,
                Place::Layer(host) => host + 1,
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

    /// Where the range is, if that is known, and one piece.
    pub(super) fn piece(&self, offset: u64, len_bytes: u64) -> Option<Piece> {
        let list = self.list.get(self.clusters(offset, len_bytes))?;
        let first = *list.first()?;
        match first {
            0 => None,
            1 => list.iter().all(|entry| *entry == 1).then_some(Piece::Base),
            _ => {
                let consecutive = list
                    .windows(2)
                    .all(|pair| pair[1] == pair[0].wrapping_add(1));
                let start = u64::from(first - 1) * self.cluster_bytes;
                consecutive.then_some(Piece::Layer(start + offset % self.cluster_bytes))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 1 << 16;

    fn places() -> Places {
        let mut places = Places::new(6 * CLUSTER + 512, CLUSTER as u32);
        let known = [
            Place::Base,
            Place::Base,
            Place::Layer(9),
            Place::Layer(10),
            Place::Layer(12),
            Place::Unknown,
            Place::Layer(13),
        ];
        for (cluster, place) in known.into_iter().enumerate() {
            places.set(cluster, place);
            assert_eq!(places.get(cluster), place);
        }
        places
    }

    #[test]
    fn a_range_in_one_piece_is_found_where_it_is() {
        let places = places();
        assert_eq!(places.piece(512, 2 * CLUSTER - 512), Some(Piece::Base));
        let layer = Some(Piece::Layer(9 * CLUSTER + 1024));
        assert_eq!(places.piece(2 * CLUSTER + 1024, 512), layer);
        assert_eq!(places.piece(2 * CLUSTER + 1024, CLUSTER), layer);
        let last = Some(Piece::Layer(13 * CLUSTER));
        assert_eq!(places.piece(6 * CLUSTER, 512), last);
    }

    #[test]
    fn a_range_of_several_pieces_or_with_unknown_clusters_is_not_found() {
        let places = places();
        for (offset, len_bytes) in [
            (CLUSTER, CLUSTER + 512),
            (3 * CLUSTER, 2 * CLUSTER),
            (4 * CLUSTER, CLUSTER + 1),
            (5 * CLUSTER, 512),
            (7 * CLUSTER, 512),
        ] {
            assert_eq!(places.piece(offset, len_bytes), None, "{offset}");
        }
    }

    #[test]
    fn what_is_forgotten_is_the_clusters_touched_and_no_others() {
        let mut places = places();
        places.forget(2 * CLUSTER - 512, 1024);
        let now = [0, 1, 2, 3].map(|cluster| places.get(cluster));
        let unknown = Place::Unknown;
        assert_eq!(now, [Place::Base, unknown, unknown, Place::Layer(10)]);
    }

    #[test]
    fn the_layers_header_is_never_a_place() {
        let mut places = places();
        places.set(0, Place::Layer(0));
        places.set(1, Place::Layer(u32::MAX));
        assert_eq!([0, 1].map(|c| places.get(c)), [Place::Unknown; 2]);
    }
}
