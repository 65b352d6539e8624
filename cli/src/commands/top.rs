//! `ratoon top`.

use std::process::ExitCode;
use std::time::Duration;

use ratoon_engine::Engine;
use ratoon_protocol::{Call, Metrics, MetricsParams};

use crate::failure::Failure;
use crate::{guest, output, units};

/// Show how busy a running VM is, and its processes.
#[derive(clap::Args)]
pub struct Args {
    /// How many processes to list.
    #[arg(long, short = 'n', default_value_t = 15, value_parser = clap::value_parser!(u32).range(0..=100))]
    processes: u32,
    /// Time between two looks; without a terminal one look is taken.
    #[arg(long, short, value_name = "TIME", default_value = "2s", value_parser = units::duration)]
    delay: Duration,
    /// Look once and end.
    #[arg(long, short = '1')]
    once: bool,
    /// Look once and print JSON.
    #[arg(long)]
    json: bool,
    /// Name, id or beginning of an id.
    #[arg(value_name = "VM")]
    vm: String,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let entry = guest::find(engine, &args.vm)?;
    let mut client = guest::connect(&entry)?;
    let call = Call::Metrics(MetricsParams {
        top: args.processes,
    });
    let mut before: Option<Metrics> = None;
    loop {
        let metrics: Metrics = client
            .call(&call, "told its metrics", guest::CALL_TIMEOUT)
            .map_err(|error| guest::failure(error, "cannot look into the VM"))?;
        if args.json {
            output::json(&metrics)?;
            return Ok(ExitCode::SUCCESS);
        }
        let again = output::is_terminal() && !args.once;
        let page = page(&metrics, before.as_ref());
        if again {
            // Home, the page, and nothing below it.
            output::write(format!("\x1b[H{}\x1b[J", page.replace('\n', "\x1b[K\n")).as_bytes())?;
        } else {
            output::write(page.as_bytes())?;
            return Ok(ExitCode::SUCCESS);
        }
        before = Some(metrics);
        std::thread::sleep(args.delay);
    }
}

fn page(now: &Metrics, before: Option<&Metrics>) -> String {
    let mib = |bytes: u64| bytes >> 20;
    let used = now.memory_total.saturating_sub(now.memory_available);
    let since = before.map_or((0, 0), |before| (before.uptime_us, before.cpu_busy_us));
    let elapsed = now.uptime_us.saturating_sub(since.0).max(1);
    let busy = 100.0 * now.cpu_busy_us.saturating_sub(since.1) as f64 / elapsed as f64;
    let mut text = format!(
        "up {} s, load {:.2}, {} processes\n\
         cpu     {busy:.0} % of {} processors\n\
         memory  {} of {} MiB used, {} MiB file cache; runtime {} KiB\n\
         disk    {} of {} MiB free\n\
         network {} KiB in, {} KiB out\n",
        now.uptime_us / 1_000_000,
        now.load,
        now.processes,
        now.cpus,
        mib(used),
        mib(now.memory_total),
        mib(now.memory_cache),
        now.runtime_memory >> 10,
        mib(now.disk_free),
        mib(now.disk_total),
        now.network_received >> 10,
        now.network_sent >> 10,
    );
    if now.top.is_empty() {
        return text;
    }
    let rows: Vec<Vec<String>> = now
        .top
        .iter()
        .map(|process| {
            let known = before.and_then(|before| before.top.iter().find(|p| p.pid == process.pid));
            let cpu = known.map_or(0, |known| process.cpu_us.saturating_sub(known.cpu_us));
            vec![
                process.pid.to_string(),
                process.uid.to_string(),
                clean(&process.state),
                match before {
                    Some(_) => format!("{:.0}", 100.0 * cpu as f64 / elapsed as f64),
                    None => "-".into(),
                },
                format!("{:.2}", process.cpu_us as f64 / 1e6),
                mib(process.memory).to_string(),
                clean(&process.command),
            ]
        })
        .collect();
    text.push('\n');
    let head = ["PID", "UID", "S", "%CPU", "SECONDS", "MIB", "COMMAND"];
    text + &output::table(&head, &rows)
}

/// The guest's words, without what steers a terminal.
fn clean(text: &str) -> String {
    let short: String = text.chars().take(100).collect();
    short.replace(char::is_control, " ")
}
