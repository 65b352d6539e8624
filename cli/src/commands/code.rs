//! `ratoon code`.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use ratoon_client::RuntimeError;
use ratoon_client::blocking::{CallIo, Client};
use ratoon_engine::Engine;
use ratoon_protocol::{
    Call, CodeContext, CodeData, CodeEnd, CodeName, CodeRun, CodeStart, CodeStatus, ErrorCode,
    Language,
};

use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::{guest, output, units};

/// Run code in a persistent interpreter of a running VM: what it defines is there the next time.
///
/// The value of the last expression is printed; PNG pictures go to files with --save. Without code,
/// file or input from a pipe, lines are read and run one cell at a time, each ended by an empty line.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon code web -c 'x = 6 * 7'
  ratoon code web -c 'x'                    # 42
  ratoon code web plot.py --save pictures/
  ratoon code web -l bash -c 'cd /tmp; pwd'
  ratoon code web --list")]
pub struct Args {
    /// The interpreter: python, node or bash.
    #[arg(long, short, value_name = "LANGUAGE", default_value = "python", value_parser = language)]
    language: Language,
    /// The context's name; one is made when it is not there.
    #[arg(long, short = 'x', value_name = "NAME")]
    context: Option<String>,
    /// The code.
    #[arg(long, short, value_name = "CODE", conflicts_with = "file")]
    code: Option<String>,
    /// Interrupt it after so long; exit code 124.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    timeout: Option<Duration>,
    /// Write pictures to this directory, as 1.png, 2.png, …
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Print what it shows as JSON, a line each, in place of text.
    #[arg(long)]
    json: bool,
    /// List the contexts and end.
    #[arg(long, conflicts_with_all = ["code", "file", "restart", "stop"])]
    list: bool,
    /// Begin the context anew, then run the code, if there is any.
    #[arg(long, requires = "context")]
    restart: bool,
    /// End the context.
    #[arg(long, requires = "context", conflicts_with_all = ["code", "file"])]
    stop: bool,
    /// Name, id or beginning of an id.
    #[arg(value_name = "VM")]
    vm: String,
    /// A file with the code; `-` reads standard input.
    file: Option<PathBuf>,
}

fn language(text: &str) -> Result<Language, String> {
    match text {
        "python" | "py" => Ok(Language::Python),
        "node" | "js" => Ok(Language::Node),
        "bash" | "sh" => Ok(Language::Bash),
        _ => Err("python, node or bash".into()),
    }
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let code = read_code(args)?;
    let entry = guest::find(engine, &args.vm)?;
    let mut client = guest::connect(&entry)?;
    if args.list {
        return list(&mut client, args);
    }
    let named = || CodeName {
        context: args.context.clone().unwrap_or_default(),
    };
    if args.stop {
        let call = Call::CodeStop(named());
        let () = client
            .call(&call, "ended the context", guest::CALL_TIMEOUT)
            .map_err(|error| guest::failure(error, "cannot end the context"))?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.restart {
        let call = Call::CodeRestart(named());
        let _: CodeContext = client
            .call(&call, "restarted the context", guest::CALL_TIMEOUT)
            .map_err(|error| guest::failure(error, "cannot restart the context"))?;
        if code.is_none() && !std::io::stdin().is_terminal() {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let mut session = Session {
        args,
        client,
        saved: 0,
    };
    match code {
        Some(code) => session.cell(&code),
        None => session.converse(),
    }
}

fn read_code(args: &Args) -> Result<Option<String>, Failure> {
    if args.list || args.stop {
        return Ok(None);
    }
    let unreadable = |name: &str, error: std::io::Error| {
        Failure::new(format!("cannot read the code from {name}: {error}"))
    };
    match (&args.code, &args.file) {
        (Some(code), _) => Ok(Some(code.clone())),
        (None, Some(path)) if path.as_os_str() != "-" => std::fs::read_to_string(path)
            .map(Some)
            .map_err(|error| unreadable(&path.display().to_string(), error)),
        (None, None) if args.restart || std::io::stdin().is_terminal() => Ok(None),
        _ => {
            let mut code = String::new();
            std::io::stdin()
                .read_to_string(&mut code)
                .map_err(|error| unreadable("standard input", error))?;
            Ok(Some(code))
        }
    }
}

fn list(client: &mut Client, args: &Args) -> Result<ExitCode, Failure> {
    let contexts: Vec<CodeContext> = client
        .call(&Call::CodeList, "listed its contexts", guest::CALL_TIMEOUT)
        .map_err(|error| guest::failure(error, "cannot list the contexts"))?;
    if args.json {
        output::json(&contexts)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<Vec<String>> = contexts
        .iter()
        .map(|context| {
            vec![
                context.context.replace(char::is_control, "\u{fffd}"),
                format!("{:?}", context.language).to_lowercase(),
                context.pid.to_string(),
                context.count.to_string(),
                if context.busy { "busy" } else { "idle" }.to_owned(),
            ]
        })
        .collect();
    let head = ["CONTEXT", "LANGUAGE", "PID", "CELLS", "STATE"];
    output::write(output::table(&head, &rows).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

struct Session<'a> {
    args: &'a Args,
    client: Client,
    saved: u32,
}

impl Session<'_> {
    /// Runs one cell and shows what comes of it.
    fn cell(&mut self, code: &str) -> Result<ExitCode, Failure> {
        let interrupts = Interrupts::listen()?;
        interrupts.command(self.client.controller());
        let end = self.run(code);
        let end = match (end, interrupts.ended()) {
            (Err(RuntimeError::Cancelled), Some(ended)) => {
                return Err(Failure::silent(ended.code()));
            }
            (end, _) => end.map_err(|error| guest::failure(error, "cannot run the code"))?,
        };
        Ok(ExitCode::from(report(&end)))
    }

    /// Runs a cell; a context that has a name is made when it is not there.
    fn run(&mut self, code: &str) -> Result<CodeEnd, RuntimeError> {
        match self.try_run(code) {
            Err(RuntimeError::Call(error))
                if error.code == ErrorCode::NotFound && self.args.context.is_some() =>
            {
                let call = Call::CodeStart(CodeStart {
                    language: self.args.language,
                    context: self.args.context.clone(),
                    ..CodeStart::default()
                });
                let _: CodeContext =
                    self.client
                        .call(&call, "started the context", guest::CALL_TIMEOUT)?;
                self.try_run(code)
            }
            end => end,
        }
    }

    fn try_run(&mut self, code: &str) -> Result<CodeEnd, RuntimeError> {
        let call = Call::CodeRun(CodeRun {
            code: code.to_owned(),
            context: self.args.context.clone(),
            language: self.args.language,
            timeout_ms: self.args.timeout.map(|time| time.as_millis() as u64),
        });
        // The value of the last expression comes after all that the cell prints, on another stream.
        let mut last = Vec::new();
        let mut data = Lines {
            show: |line: &[u8]| match serde_json::from_slice::<CodeData>(line) {
                Ok(shown) if shown.result => {
                    last = line.to_vec();
                    Ok(())
                }
                _ => show(self.args, &mut self.saved, line),
            },
            rest: Vec::new(),
        };
        let mut io = CallIo {
            stdin: None,
            stdout: &mut std::io::stdout(),
            stderr: &mut std::io::stderr(),
            data: &mut data,
            events: &mut |_| {},
            ended: &mut |_| {},
        };
        let end = self.client.run(&call, &mut io)?;
        if !last.is_empty() {
            show(self.args, &mut self.saved, &last).map_err(|source| RuntimeError::Output {
                stream: "data",
                source,
            })?;
        }
        Ok(end)
    }

    /// Reads cells from the terminal, each to an empty line.
    fn converse(&mut self) -> Result<ExitCode, Failure> {
        let mut cell = String::new();
        loop {
            let prompt = if cell.is_empty() { ">>> " } else { "... " };
            output::write(prompt.as_bytes())?;
            let mut line = String::new();
            let end = std::io::stdin().read_line(&mut line)? == 0;
            let done = end || line.trim().is_empty() || (cell.is_empty() && !opens(&line));
            cell += &line;
            if done && !cell.trim().is_empty() {
                let end = self
                    .run(&cell)
                    .map_err(|error| guest::failure(error, "cannot run the code"))?;
                report(&end);
            }
            if done {
                cell.clear();
            }
            if end {
                output::line("")?;
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
}

/// Whether a line begins something that goes on.
fn opens(line: &str) -> bool {
    let line = line.trim_end();
    line.ends_with([':', '{', '(', '[', '\\', ',']) || line.starts_with('@')
}

/// Says how a cell ended, if not well; returns the exit code that says so.
fn report(end: &CodeEnd) -> u8 {
    if let Some(error) = &end.error {
        let shown = |text: &str| {
            text.replace(
                |c: char| c.is_control() && c != '\n' && c != '\t',
                "\u{fffd}",
            )
        };
        let text = match error.traceback.is_empty() {
            true => format!("{}: {}", error.name, error.message),
            false => error.traceback.trim_end().to_owned(),
        };
        let _ = writeln!(std::io::stderr(), "{}", shown(&text));
    }
    match end.status {
        CodeStatus::Ok => 0,
        CodeStatus::Error => 1,
        CodeStatus::Timeout => 124,
        CodeStatus::Interrupted => 130,
        CodeStatus::Died => {
            let _ = writeln!(
                std::io::stderr(),
                "the interpreter has ended; its state is lost"
            );
            1
        }
    }
}

/// Shows a value: as text, and pictures as files.
fn show(args: &Args, saved: &mut u32, line: &[u8]) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    if args.json {
        out.write_all(line)?;
        return out.write_all(b"\n");
    }
    let Ok(shown) = serde_json::from_slice::<CodeData>(line) else {
        return Ok(());
    };
    let png = shown.data.get("image/png").and_then(|png| png.as_str());
    let png = png.and_then(|png| BASE64_STANDARD.decode(png.replace('\n', "")).ok());
    if let (Some(dir), Some(png)) = (&args.save, png) {
        *saved += 1;
        let path = dir.join(format!("{saved}.png"));
        std::fs::create_dir_all(dir)?;
        std::fs::write(&path, png)?;
        return writeln!(out, "{}", path.display());
    }
    match shown.data.get("text/plain").and_then(|text| text.as_str()) {
        Some(text) => writeln!(out, "{text}"),
        None => Ok(()),
    }
}

/// Cuts a stream into lines.
struct Lines<F> {
    show: F,
    rest: Vec<u8>,
}

impl<F: FnMut(&[u8]) -> std::io::Result<()>> Write for Lines<F> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            (self.show)(&line[..end])?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
