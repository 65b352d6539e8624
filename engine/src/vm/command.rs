//! What a VM runs: the image's configuration and the caller's wishes made into one command, as
//! container tools do it.
//!
//! The command is `entrypoint` followed by the caller's arguments, or by the image's `cmd` when
//! there are none. The caller's environment is added to the image's, the last of a name counts.

use ratoon_protocol::ExecParams;

/// What the caller asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandSpec {
    /// The command, or arguments of the image's entrypoint. Empty: the image's own.
    pub argv: Vec<String>,
    /// Replaces the image's entrypoint; an empty one removes it.
    pub entrypoint: Option<Vec<String>>,
    /// `NAME=value`, added to the image's.
    pub env: Vec<(String, String)>,
    /// Where to start, in place of the image's directory.
    pub workdir: Option<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`, in place of the image's.
    pub user: Option<String>,
}

/// What an image says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageCommand {
    /// `NAME=value` pairs.
    pub env: Vec<String>,
    /// Who runs it.
    pub user: Option<String>,
    /// Where to start.
    pub workdir: Option<String>,
    /// First part of the command.
    pub entrypoint: Vec<String>,
    /// Its default arguments.
    pub cmd: Vec<String>,
}

/// Why there is no command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Neither the caller nor the image names a program.
    #[error("no command given and the image has none: add one after `--`")]
    NoCommand,
    /// The environment cannot hold it.
    #[error("{0:?} is not NAME=VALUE with a name of at least one byte")]
    BadEnv(String),
}

/// Reads `NAME=value`.
///
/// # Errors
/// [`CommandError::BadEnv`].
pub fn parse_env(text: &str) -> Result<(String, String), CommandError> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !text.contains('\0') => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(CommandError::BadEnv(text.to_owned())),
    }
}

/// The command to run.
///
/// # Errors
/// [`CommandError::NoCommand`]. An image's environment entries that are none are left out.
pub fn resolve(image: &ImageCommand, spec: &CommandSpec) -> Result<ExecParams, CommandError> {
    let mut argv = spec
        .entrypoint
        .clone()
        .unwrap_or_else(|| image.entrypoint.clone());
    if !spec.argv.is_empty() {
        argv.extend_from_slice(&spec.argv);
    } else if spec.entrypoint.is_none() {
        // Another entrypoint does not take the image's arguments.
        argv.extend_from_slice(&image.cmd);
    }
    if argv.is_empty() {
        return Err(CommandError::NoCommand);
    }
    let mut env: Vec<(String, String)> = Vec::new();
    let images = image.env.iter().filter_map(|text| parse_env(text).ok());
    for (name, value) in images.chain(spec.env.iter().cloned()) {
        match env.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = value,
            None => env.push((name, value)),
        }
    }
    let given = |own: &Option<String>, images: &Option<String>| {
        own.clone()
            .or_else(|| images.clone())
            .filter(|text| !text.is_empty())
    };
    Ok(ExecParams {
        argv,
        env,
        cwd: given(&spec.workdir, &image.workdir),
        user: given(&spec.user, &image.user),
        stdin: false,
        ..ExecParams::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn image() -> ImageCommand {
        ImageCommand {
            env: vec!["A=image".into(), "B=1".into(), "broken".into()],
            user: Some("app".into()),
            workdir: Some("/srv".into()),
            entrypoint: words("/entry -x"),
            cmd: words("serve now"),
        }
    }

    fn argv(image: &ImageCommand, spec: &CommandSpec) -> Vec<String> {
        resolve(image, spec).unwrap().argv
    }

    #[test]
    fn arguments_replace_the_images_cmd_but_not_its_entrypoint() {
        let mut spec = CommandSpec::default();
        assert_eq!(argv(&image(), &spec), words("/entry -x serve now"));
        spec.argv = words("ls /");
        assert_eq!(argv(&image(), &spec), words("/entry -x ls /"));
    }

    #[test]
    fn another_entrypoint_drops_the_images_cmd() {
        let mut spec = CommandSpec {
            entrypoint: Some(words("/bin/sh")),
            ..CommandSpec::default()
        };
        assert_eq!(argv(&image(), &spec), words("/bin/sh"));
        spec.argv = words("-c id");
        spec.entrypoint = Some(Vec::new());
        assert_eq!(argv(&image(), &spec), words("-c id"));
    }

    #[test]
    fn without_any_program_there_is_no_command() {
        let none = resolve(&ImageCommand::default(), &CommandSpec::default());
        assert_eq!(none, Err(CommandError::NoCommand));
    }

    #[test]
    fn the_callers_settings_come_before_the_images() {
        let spec = CommandSpec {
            env: vec![
                ("A".into(), "1".into()),
                ("C".into(), "x=y".into()),
                ("A".into(), "2".into()),
            ],
            workdir: Some("/tmp".into()),
            user: Some("0".into()),
            ..CommandSpec::default()
        };
        let params = resolve(&image(), &spec).unwrap();
        let env: Vec<_> = params.env.iter().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(env, ["A=2", "B=1", "C=x=y"]);
        assert_eq!(params.cwd.as_deref(), Some("/tmp"));
        assert_eq!(params.user.as_deref(), Some("0"));
        let own = resolve(&image(), &CommandSpec::default()).unwrap();
        assert_eq!(own.user.as_deref(), Some("app"));
        assert_eq!(own.cwd.as_deref(), Some("/srv"));
    }

    #[test]
    fn an_environment_entry_needs_a_name_and_a_sign() {
        assert_eq!(parse_env("A=b=c"), Ok(("A".into(), "b=c".into())));
        for bad in ["A", "=b", "", "A=\0"] {
            assert_eq!(parse_env(bad), Err(CommandError::BadEnv(bad.into())));
        }
    }
}
