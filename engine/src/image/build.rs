//! Builds images from recipes with mmdebstrap.
//!
//! mmdebstrap hands us a tar on its standard output, which goes the way of every other tar. It
//! works in namespaces of its own, also for root, so that a killed build leaves no mounts.
//!
//! Nothing of this machine enters the image: no host name, resolver, apt proxy or source. The
//! sources are those that mmdebstrap gives a stable suite itself, unless the caller names a mirror.

use std::fs;
use std::io::BufReader;
use std::process::Command;

use super::archive::Archive;
use super::config::{ContainerConfig, Image};
use super::error::{Context as _, Error, Result};
use super::store::{ImageStore, NewImage};
use super::stream::{Budget, Limits};
use super::tool::{DEBUGFS, MKE2FS, MMDEBSTRAP, Tool};
use super::tree::Tree;
use super::{Progress, ext4};

/// Raised when a recipe's fixed parts change, so that old images are not taken for new ones.
const RECIPE_VERSION: u32 = 1;
/// Debian's suite when the host is not Debian.
const DEFAULT_SUITE: &str = "bookworm";

/// Packages of the image `debian`, beyond Debian's required ones.
const DEBIAN: &[&str] = &[
    "bzip2",
    "ca-certificates",
    "curl",
    "file",
    "git",
    "iproute2",
    "iputils-ping",
    "jq",
    "less",
    "nano",
    "netbase",
    "openssh-client",
    "patch",
    "procps",
    "python3",
    "python3-pip",
    "python3-venv",
    "ripgrep",
    "rsync",
    "sudo",
    "tzdata",
    "unzip",
    "xz-utils",
    "zip",
    "zstd",
];
/// What `debian-dev` adds.
const DEBIAN_DEV: &[&str] = &[
    "autoconf",
    "automake",
    "build-essential",
    "cmake",
    "gdb",
    "libffi-dev",
    "libssl-dev",
    "libtool",
    "ninja-build",
    "pkg-config",
    "python3-dev",
    "strace",
    "vim-tiny",
    "wget",
    "zlib1g-dev",
];
/// Left out of every package: nobody reads them in a sandbox. Licences stay.
const EXCLUDES: &[&str] = &[
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/gnome/help/*",
    "path-exclude=/usr/share/lintian/*",
];
/// Run on the finished tree, as `sh -c`, with the tree as `$1`. The byte code spares a slow guest
/// from compiling at each start; package scripts make it only for part of the modules.
const CUSTOMIZE: &[&str] = &[
    r#"printf 'sandbox\n' > "$1/etc/hostname""#,
    r#"printf '127.0.0.1\tlocalhost sandbox\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n' > "$1/etc/hosts""#,
    r#": > "$1/etc/resolv.conf""#,
    r#"chmod 644 "$1/etc/hostname" "$1/etc/hosts" "$1/etc/resolv.conf""#,
    r#": > "$1/etc/machine-id" && rm -f "$1/var/lib/dbus/machine-id""#,
    r#"rm -f "$1/etc/apt/apt.conf.d/99mmdebstrap" "$1/etc/ssh/ssh_host_"*"#,
    r#"chroot "$1" python3 -m compileall -q -j 0 /usr/lib/python3 "$(chroot "$1" python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" > /dev/null || true"#,
    r#"find "$1/var/log" "$1/var/cache/debconf" "$1/var/lib/apt/lists" -type f -delete"#,
];
/// apt's settings on this host that a build needs to reach its sources. They are used for the
/// build and taken out of the image (see [`CUSTOMIZE`]).
const HOST_APT_SETTINGS: &[&str] = &[
    "Acquire::Check-Date",
    "Acquire::Check-Valid-Until",
    "Acquire::http::Proxy",
    "Acquire::https::Proxy",
];

/// The recipes' names.
pub const RECIPES: &[&str] = &["debian", "debian-dev"];

/// How to build.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// Build even when the same recipe was built before.
    pub rebuild: bool,
    /// Debian's suite; none means the host's own, or bookworm on other systems.
    pub suite: Option<String>,
    /// A mirror's URL or a line in sources.list form, in place of mmdebstrap's default. The image
    /// keeps it as its apt source.
    pub mirror: Option<String>,
}

struct Recipe {
    name: &'static str,
    packages: Vec<&'static str>,
}

fn recipe(name: &str) -> Result<Recipe> {
    let mut packages = DEBIAN.to_vec();
    let name = match name {
        "debian" => "debian",
        "debian-dev" => {
            packages.extend(DEBIAN_DEV);
            "debian-dev"
        }
        other => {
            return Err(Error::UnknownRecipe {
                recipe: other.to_owned(),
            });
        }
    };
    Ok(Recipe { name, packages })
}

impl ImageStore {
    /// Builds the image of a recipe, or hands back the one that the same recipe gave before.
    ///
    /// # Errors
    /// [`Error::UnknownRecipe`], [`Error::MissingTool`], [`Error::ToolFailed`],
    /// [`Error::DiskFull`], [`Error::Cancelled`], [`Error::Io`].
    pub fn build(&self, recipe: &str, progress: &dyn Progress) -> Result<Image> {
        self.build_with(recipe, &BuildOptions::default(), progress)
    }

    /// [`ImageStore::build`] with options.
    ///
    /// # Errors
    /// As [`ImageStore::build`].
    pub fn build_with(
        &self,
        name: &str,
        options: &BuildOptions,
        progress: &dyn Progress,
    ) -> Result<Image> {
        let recipe = recipe(name)?;
        let suite = options.suite.clone().unwrap_or_else(host_suite);
        check_suite(&suite)?;
        let arguments = arguments(&recipe, &suite, options.mirror.as_deref());
        let key = key(recipe.name, &arguments);
        let _making = self.making(&key, progress)?;
        if !options.rebuild
            && let Some(image) = self.by_key(&key)?
        {
            if image.names.iter().any(|of| of == recipe.name) {
                return Ok(image);
            }
            return self.name_image(&image, recipe.name, true);
        }
        for tool in [MMDEBSTRAP, MKE2FS, DEBUGFS] {
            tool.find()?;
        }
        check_privilege()?;
        let scratch = self.scratch()?;
        let tree = unpack(&recipe, &suite, &arguments, scratch.path(), progress)?;
        progress.step("making the disk");
        let blob = scratch.path().join("blob");
        fs::create_dir(&blob).at("create", &blob)?;
        let folder = tree.path().to_path_buf();
        let (summary, fixes) = tree.finish()?;
        let disk = blob.join("disk.ext4");
        ext4::make(&folder, &disk, scratch.path(), &summary, &fixes, progress)?;
        let new = NewImage {
            blob,
            source: format!("recipe {} ({suite})", recipe.name),
            key: &key,
            container: ContainerConfig::default(),
            name: recipe.name,
            take_name: true,
        };
        self.publish(new, progress)
    }
}

/// Runs mmdebstrap and unpacks what it sends.
fn unpack(
    recipe: &Recipe,
    suite: &str,
    arguments: &[String],
    scratch: &std::path::Path,
    progress: &dyn Progress,
) -> Result<Tree> {
    progress.step(&format!(
        "building {} from Debian {suite} with mmdebstrap",
        recipe.name
    ));
    let mut command = MMDEBSTRAP.command()?;
    command.args(host_apt_options()).args(arguments);
    if rustix::process::geteuid().is_root() {
        // A killed build's folders are swept with ours. Not for a normal user: the ids that
        // mmdebstrap works under could not get in.
        let work = scratch.join("work");
        fs::create_dir(&work).at("create", &work)?;
        command.env("TMPDIR", &work);
    }
    let mut running = MMDEBSTRAP.start(command, progress)?;
    let mut tree = Tree::create(&scratch.join("tree"))?;
    tree.begin_layer("mmdebstrap's tar");
    let budget = Budget::new(Limits::default());
    let stdout = Box::new(BufReader::with_capacity(1 << 20, &mut running));
    let mut archive = Archive::new(stdout, "mmdebstrap's tar", &budget);
    let unpacked = (|| {
        while let Some(entry) = archive.next()? {
            tree.put(&entry, &mut archive, progress)?;
        }
        archive.drain()
    })();
    // When mmdebstrap fails its tar breaks off: its own error is the one to show.
    match unpacked {
        Ok(()) | Err(Error::DamagedArchive { .. }) => {}
        Err(error) => return Err(error),
    }
    let (status, output) = running.wait()?;
    if !status.success() {
        return Err(explain(MMDEBSTRAP, status, &output));
    }
    unpacked.map(|()| tree)
}

/// The error for a failed mmdebstrap, with the remedy where the cause is known.
fn explain(tool: Tool, status: std::process::ExitStatus, output: &[String]) -> Error {
    let said = |text: &str| output.iter().any(|line| line.contains(text));
    if said("newuidmap") || said("/etc/subuid") {
        return Error::ToolFailed {
            tool: tool.name,
            status: status.to_string(),
            detail: "a build by a normal user needs newuidmap (`apt install uidmap`) and a range \
                     of ids for this user in /etc/subuid and /etc/subgid; or build as root"
                .into(),
        };
    }
    if said("NO_PUBKEY") || said("keyring") && said("not signed") {
        return Error::ToolFailed {
            tool: tool.name,
            status: status.to_string(),
            detail: "Debian's signing keys are missing: `apt install debian-archive-keyring`"
                .into(),
        };
    }
    // Its errors begin with E:, apt's and its own.
    let errors: Vec<String> = output
        .iter()
        .filter(|line| line.starts_with("E:") || line.contains("No space left"))
        .cloned()
        .collect();
    tool.failed(status, if errors.is_empty() { output } else { &errors })
}

/// A normal user needs newuidmap; say so before the downloads.
fn check_privilege() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Tool {
        name: "newuidmap",
        package: "uidmap",
    }
    .find()
    .map(drop)
}

fn arguments(recipe: &Recipe, suite: &str, mirror: Option<&str>) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "--mode=unshare",
        "--variant=minbase",
        "--format=tar",
        "--skip=output/dev",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.push("--aptopt=Acquire::Languages \"none\"".into());
    arguments.extend(
        EXCLUDES
            .iter()
            .map(|exclude| format!("--dpkgopt={exclude}")),
    );
    arguments.extend(
        CUSTOMIZE
            .iter()
            .map(|command| format!("--customize-hook={command}")),
    );
    arguments.push(format!("--include={}", recipe.packages.join(",")));
    arguments.push(suite.to_owned());
    arguments.push("-".into());
    arguments.extend(mirror.map(str::to_owned));
    arguments
}

fn key(name: &str, arguments: &[String]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("ratoon recipe {RECIPE_VERSION} {name}\0").as_bytes());
    for argument in arguments {
        hasher.update(argument.as_bytes());
        hasher.update(b"\0");
    }
    hasher.finalize().to_hex().to_string()
}

/// `VERSION_CODENAME` of a Debian host (os-release(5)), else the default.
fn host_suite() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    suite_of(&text).unwrap_or_else(|| DEFAULT_SUITE.to_owned())
}

fn suite_of(os_release: &str) -> Option<String> {
    let field = |name: &str| {
        let line = os_release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim_matches(['"', '\'']).to_owned())
    };
    let suite = field("VERSION_CODENAME")?;
    (field("ID")? == "debian" && check_suite(&suite).is_ok()).then_some(suite)
}

/// A suite is a word: it must not be taken for an option.
fn check_suite(suite: &str) -> Result<()> {
    let sound = !suite.is_empty()
        && suite.len() <= 64
        && suite
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !suite.starts_with('-');
    if sound {
        return Ok(());
    }
    Err(Error::ToolFailed {
        tool: MMDEBSTRAP.name,
        status: "not started".into(),
        detail: format!("`{suite}` is not a suite: use a code name such as {DEFAULT_SUITE}"),
    })
}

/// apt's settings of this host, as options for mmdebstrap. Without apt-config there are none.
fn host_apt_options() -> Vec<String> {
    let Ok(output) = Command::new("apt-config").arg("dump").output() else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| {
            let name = line.split(' ').next().unwrap_or_default();
            HOST_APT_SETTINGS.contains(&name) && !line.ends_with(" \"\";")
        })
        .map(|line| format!("--aptopt={}", line.trim_end_matches(';')))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_recipe_is_named_with_the_known_ones() {
        let error = recipe("arch").map(drop).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no recipe `arch`: the recipes are debian, debian-dev"
        );
    }

    #[test]
    fn every_listed_recipe_exists() {
        for name in RECIPES {
            assert_eq!(recipe(name).unwrap().name, *name);
        }
    }

    #[test]
    fn the_key_changes_with_the_suite_and_the_packages() {
        let of =
            |name: &str, suite: &str| key(name, &arguments(&recipe(name).unwrap(), suite, None));
        assert_eq!(of("debian", "bookworm"), of("debian", "bookworm"));
        assert_ne!(of("debian", "bookworm"), of("debian", "trixie"));
        assert_ne!(of("debian", "bookworm"), of("debian-dev", "bookworm"));
    }

    #[test]
    fn the_suite_is_the_hosts_only_on_debian() {
        let debian = "ID=debian\nVERSION_CODENAME=trixie\n";
        assert_eq!(suite_of(debian).as_deref(), Some("trixie"));
        assert_eq!(suite_of("ID=ubuntu\nVERSION_CODENAME=noble\n"), None);
        assert_eq!(suite_of("ID=debian\n"), None);
    }

    #[test]
    fn a_suite_that_looks_like_an_option_is_refused() {
        let error = check_suite("--hook-directory=x").unwrap_err();
        assert!(error.to_string().contains("is not a suite"), "{error}");
    }
}
