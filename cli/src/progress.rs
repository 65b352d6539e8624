//! Progress for people on standard error: one line that goes away, or plain lines when nobody
//! watches a terminal.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ratoon_engine::image;

use crate::output;

/// A spinner with a message and the time since its start; nothing when standard error is no
/// terminal. Gone when it is dropped.
pub struct Spinner(ProgressBar);

impl Spinner {
    /// Shows `message`.
    pub fn start(message: String) -> Self {
        // A tick is a thread, which nobody needs who sees nothing of it.
        if !output::errors_go_to_a_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_message(message);
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Progress of work on images.
pub struct ImageProgress {
    bar: Option<ProgressBar>,
    step: Mutex<String>,
    cancelled: &'static AtomicBool,
}

impl ImageProgress {
    /// Shows nothing yet. The work ends early once `cancelled` is set.
    pub fn new(cancelled: &'static AtomicBool) -> Self {
        Self {
            bar: output::errors_go_to_a_terminal().then(ProgressBar::new_spinner),
            step: Mutex::default(),
            cancelled,
        }
    }

    fn template(bar: &ProgressBar, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
    }
}

impl image::Progress for ImageProgress {
    fn step(&self, what: &str) {
        let mut step = self
            .step
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        what.clone_into(&mut step);
        match &self.bar {
            Some(bar) => {
                bar.unset_length();
                bar.set_position(0);
                Self::template(bar, "{spinner} {msg} {elapsed}");
                bar.set_message(step.clone());
                bar.enable_steady_tick(Duration::from_millis(100));
            }
            None => {
                use std::io::Write;
                let _ = writeln!(std::io::stderr(), "{what}");
            }
        }
    }

    fn line(&self, text: &str) {
        if let Some(bar) = &self.bar {
            let step = self
                .step
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            // One line on the terminal, whatever the program prints.
            let text: String = text.chars().filter(|c| !c.is_control()).take(60).collect();
            bar.set_message(format!("{step}: {text}"));
        }
    }

    fn bytes(&self, done: u64, total: Option<u64>) {
        if let Some(bar) = &self.bar {
            match total {
                Some(total) => {
                    Self::template(
                        bar,
                        "{spinner} {msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}",
                    );
                    bar.set_length(total);
                }
                None => Self::template(bar, "{spinner} {msg} {binary_bytes} {elapsed}"),
            }
            bar.set_position(done);
        }
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

impl ratoon_engine::snapshot::Progress for ImageProgress {
    fn step(&self, what: &str) {
        // Too short a work to tell of where nobody watches.
        if self.bar.is_some() {
            image::Progress::step(self, what);
        }
    }

    fn bytes(&self, done: u64, total: u64) {
        image::Progress::bytes(self, done, Some(total));
    }

    fn cancelled(&self) -> bool {
        image::Progress::cancelled(self)
    }
}

impl Drop for ImageProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
