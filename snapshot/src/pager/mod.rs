//! Lazy restore of chunked memory: one process a generation that fetches what its clones touch.
//!
//! ```text
//!   VMM: maps the memfd privately, ---fault---> pager: PageSource -> unpack -> BLAKE3
//!        userfaultfd over the mapping <-CONTINUE--  -> memfd, once for all clones
//! ```
//!
//! A page reaches a clone only by UFFDIO_CONTINUE (or ZEROPAGE, for a chunk that is known to be all
//! zero), after its whole chunk is in the memfd and fits its hash: the mapping is registered for
//! missing *and* minor faults, so that even a page that is in the memfd already waits for the pager's
//! word. A clone's writes are private copies. MADV_DONTNEED in a clone gives the page back to the
//! generation: the next touch is a fault like the first, so no event of it is needed.
//!
//! **Failure.** A chunk that cannot be had or proved is told to the clone that touched it, which ends
//! ([`Word::Failed`]). A clone whose pager goes away reads [`Word::Gone`] and ends; until it has, its
//! own copy of the userfaultfd keeps its faults waiting. No fault is ever resolved by a guess.
//! A pager that is stopped is silent, and its clones end ([`Word::Silent`]); one whose storage does not answer
//! tells those that wait for it.
//!
//! [`Pager`] is that process, [`Link`] a clone's end of it. Neither knows of KVM.

mod clone;
mod fill;
mod link;
mod serve;
mod shared;
#[cfg(test)]
mod tests;
mod uffd;

pub use link::{Link, Part, SILENCE, Word};
pub use serve::{BEAT, FETCH, Pager};
pub use uffd::{Userfaultfd, is_permitted};
