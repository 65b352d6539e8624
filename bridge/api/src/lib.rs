//! What the bridge shares with those who use it, as plain types.
//!
//! * [`control`]: what the engine tells it over its control socket, and [`control::Client`].
//! * [`record`]: the lines that it writes about a run, and how they are chained.
//! * [`audit`]: reads a run's record back and checks every hash.
//! * [`socket`]: listening at a Unix socket.
//! * [`amount`]: tokens, money and calls, as budgets and the record count them.
//!
//! It depends on neither tokio nor TLS, so that engine and command line stay as small as they are.

pub mod amount;
pub mod audit;
pub mod control;
pub mod record;
pub mod socket;
