//! `ratoon image`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use ratoon_engine::image::{BuildOptions, Image, ImageStore, ImportKind, RECIPES};
use ratoon_engine::{Engine, WarmGeneration};
use serde::Serialize;
use serde_json::json;

use crate::failure::{FAILED, Failure};
use crate::interrupt::cancel_on_signals;
use crate::progress::ImageProgress;
use crate::{output, units};

/// Build, import, list and remove images.
#[derive(clap::Subcommand)]
pub enum Command {
    Build(Build),
    Import(Import),
    Ls(Ls),
    Inspect(Inspect),
    Warm(Box<super::warm::Args>),
    Rm(Rm),
}

/// Build an image from one of Ratoon's recipes with mmdebstrap.
#[derive(clap::Args)]
pub struct Build {
    /// debian (Python, git, curl) or debian-dev (with compilers).
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(RECIPES))]
    recipe: String,
    /// Build even when it was built before.
    #[arg(long)]
    rebuild: bool,
    /// Debian's suite, such as bookworm.
    #[arg(long)]
    suite: Option<String>,
    /// A mirror's URL or a sources.list line.
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// Print the image as JSON.
    #[arg(long)]
    json: bool,
}

/// Import an image: a root file system (directory, tar, raw ext4 file), an OCI layout, or what
/// `docker save` gives.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  docker export CONTAINER > app.tar; ratoon image import app.tar --name app
  docker save app:1 > app.tar; ratoon image import app.tar --name app")]
pub struct Import {
    /// File or directory.
    source: PathBuf,
    /// What to call it.
    #[arg(long, short)]
    name: String,
    /// What the source is, when its content does not tell.
    #[arg(long, value_parser = kind)]
    kind: Option<ImportKind>,
    /// Print the image as JSON.
    #[arg(long)]
    json: bool,
}

/// List images.
#[derive(clap::Args)]
pub struct Ls {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Show an image's record and its warm generations as JSON.
#[derive(clap::Args)]
pub struct Inspect {
    /// Also read its whole disk and check it against the digest.
    #[arg(long)]
    verify: bool,
    /// Name, digest, or at least 12 digits of it.
    image: String,
}

/// Remove images, with their warm generations. One that a VM uses, or that a stored snapshot stands on, is refused.
#[derive(clap::Args)]
pub struct Rm {
    /// All names of an image, whoever uses it: a VM goes on, a snapshot cannot be restored any more.
    #[arg(long, short)]
    force: bool,
    /// Names, digests, or at least 12 digits of them.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

fn kind(text: &str) -> Result<ImportKind, String> {
    ImportKind::ALL
        .iter()
        .find(|(name, _)| *name == text)
        .map(|(_, kind)| *kind)
        .ok_or_else(|| {
            let names: Vec<_> = ImportKind::ALL.iter().map(|(name, _)| *name).collect();
            format!("choose one of {}", names.join(", "))
        })
}

pub fn run(engine: &Engine, command: Command) -> Result<ExitCode, Failure> {
    let store = engine.images()?;
    match command {
        Command::Build(args) => {
            let progress = ImageProgress::new(cancel_on_signals()?);
            let options = BuildOptions {
                rebuild: args.rebuild,
                suite: args.suite,
                mirror: args.mirror,
            };
            let built = store.build_with(&args.recipe, &options, &progress);
            drop(progress);
            made(&built?, args.json)?;
        }
        Command::Import(args) => {
            let progress = ImageProgress::new(cancel_on_signals()?);
            let imported = store.import(&args.source, args.kind, &args.name, &progress);
            drop(progress);
            made(&imported?, args.json)?;
        }
        Command::Ls(args) => list(engine, &store.list()?, args.json)?,
        Command::Inspect(args) => {
            let image = if args.verify {
                let progress = ImageProgress::new(cancel_on_signals()?);
                store.inspect(&args.image, &progress)?
            } else {
                store.get(&args.image)?
            };
            let warm = engine.warm_generations()?;
            output::json(&Shown::of(&image, &warm))?;
        }
        Command::Warm(args) => return super::warm::run(engine, &args),
        Command::Rm(args) => return remove(engine, &store, &args),
    }
    Ok(ExitCode::SUCCESS)
}

fn made(image: &Image, as_json: bool) -> Result<(), Failure> {
    if as_json {
        return output::json(&json!({ "image": image, "cached": image.cached }));
    }
    let names = image.names.join(", ");
    let how = if image.cached { " (was there)" } else { "" };
    output::line(&format!(
        "{names} {} {}{how}",
        short(image.digest()),
        units::bytes(image.config.stored_bytes)
    ))
}

/// An image, and what its VMs start from.
#[derive(Serialize)]
struct Shown<'s> {
    #[serde(flatten)]
    image: &'s Image,
    warm: Vec<ShownWarm>,
}

#[derive(Serialize)]
struct ShownWarm {
    cpus: u32,
    memory_mib: u64,
    disk_bytes: u64,
    used_unix_seconds: u64,
}

impl<'s> Shown<'s> {
    fn of(image: &'s Image, warm: &[WarmGeneration]) -> Self {
        let own = warm.iter().filter(|it| it.image_digest == image.digest());
        let shown = own.map(|it| ShownWarm {
            cpus: it.cpus,
            memory_mib: it.memory_mib,
            disk_bytes: it.disk_bytes,
            used_unix_seconds: it
                .used
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_secs()),
        });
        Self {
            image,
            warm: shown.collect(),
        }
    }
}

fn list(engine: &Engine, images: &[Image], as_json: bool) -> Result<(), Failure> {
    let warm = engine.warm_generations()?;
    let shown = |image| Shown::of(image, &warm);
    if as_json {
        return output::json(&images.iter().map(shown).collect::<Vec<_>>());
    }
    let rows: Vec<_> = images
        .iter()
        .map(|image| {
            let created = UNIX_EPOCH + Duration::from_secs(image.config.created_unix_seconds);
            vec![
                if image.names.is_empty() {
                    "-".to_owned()
                } else {
                    image.names.join(",")
                },
                short(image.digest()).to_owned(),
                units::bytes(image.config.stored_bytes),
                units::bytes(image.config.size_bytes),
                match shown(image).warm.iter().map(|it| it.disk_bytes).sum() {
                    0 => "-".to_owned(),
                    bytes => units::bytes(bytes),
                },
                units::age(created.elapsed().unwrap_or_default()),
                image.config.source.clone(),
            ]
        })
        .collect();
    let head = ["NAME", "DIGEST", "STORED", "DISK", "WARM", "AGE", "SOURCE"];
    output::write(output::table(&head, &rows).as_bytes())
}

pub fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

fn remove(engine: &Engine, store: &ImageStore, args: &Rm) -> Result<ExitCode, Failure> {
    let mut code = ExitCode::SUCCESS;
    for image in &args.images {
        match store.remove(image, args.force) {
            Ok(removed) if removed.disk => {
                engine.forget_warm(&removed.digest)?;
                output::line(&format!("{image}: removed"))?;
            }
            Ok(_) => output::line(&format!("{image}: name removed, the image has others"))?,
            Err(error) => {
                Failure::from(error).report();
                code = ExitCode::from(FAILED);
            }
        }
    }
    Ok(code)
}
