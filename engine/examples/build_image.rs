//! Builds or imports an image: a stand-in until the command line has `image`.
use ratoon_engine::dirs::Dirs;
use ratoon_engine::image::{ImageStore, Progress};

struct Plain;
impl Progress for Plain {
    fn step(&self, what: &str) {
        eprintln!("== {what}");
    }
    fn line(&self, text: &str) {
        eprintln!("   {text}");
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let store = ImageStore::open(Dirs::from_env()?.cache())?;
    let image = match arguments.as_slice() {
        [source, name] => store.import(source.as_ref(), None, name, &Plain)?,
        [recipe] => store.build(recipe, &Plain)?,
        _ => return Err("build_image <recipe> | <source> <name>".into()),
    };
    println!("{}", image.disk.display());
    Ok(())
}
