//! Container images: finds the layers and the config, and checks every digest.
//!
//! OCI image layout 1.x (a folder or a tar of it) and docker-archive (`docker save`). An index
//! leads to linux/amd64. A blob's SHA-256 and size are checked before its bytes are parsed; a
//! layer's unpacked bytes are checked against the config's `diff_ids` while it is unpacked.

use std::io::Read as _;

use oci_spec::image::{
    Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Progress;
use super::archive::Archive;
use super::config::{ContainerConfig, is_digest};
use super::error::{Context as _, Error, Result};
use super::source::Source;
use super::stream::{Budget, Hashing, Limits, unpack};
use super::tree::Tree;

/// An index may point at an index; no deeper than this.
const MAX_INDEX_DEPTH: usize = 4;

/// A container image, ready to unpack.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) layers: Vec<Layer>,
    pub(super) container: ContainerConfig,
    /// SHA-256 of the config, which names all layers: same config, same content.
    pub(super) identity: String,
}

/// One layer.
#[derive(Debug)]
pub(super) struct Layer {
    /// Part in the source.
    part: String,
    /// SHA-256 of the unpacked tar.
    diff_id: String,
}

/// An entry of docker's `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    layers: Vec<String>,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
}

/// What a source holds and how to name it in errors.
pub(super) struct Reader<'s> {
    pub(super) source: &'s Source,
    pub(super) archive: &'s str,
    pub(super) limits: Limits,
    pub(super) progress: &'s dyn Progress,
}

impl Reader<'_> {
    /// Reads an OCI layout's index, manifest and config.
    pub(super) fn plan_oci(&self) -> Result<Plan> {
        let index: ImageIndex = self.json("index.json", &self.part("index.json")?)?;
        let descriptor = self.choose(&index, 0)?;
        let manifest: ImageManifest = self.blob_json(&descriptor)?;
        if manifest.config().media_type() != &MediaType::ImageConfig
            && manifest.config().media_type().as_ref()
                != "application/vnd.docker.container.image.v1+json"
        {
            return Err(self.bad(format!(
                "its config has media type {}: it is an artifact, not an image that can run",
                manifest.config().media_type()
            )));
        }
        let config_digest = self.sha256(manifest.config())?;
        let config: ImageConfiguration = self.blob_json(manifest.config())?;
        let mut parts = Vec::new();
        for layer in manifest.layers() {
            check_layer_type(layer.media_type().as_ref()).map_err(|reason| self.bad(reason))?;
            self.verify(layer)?;
            parts.push(blob_name(&self.sha256(layer)?));
        }
        self.plan(parts, &config, config_digest)
    }

    /// Reads a docker-archive's manifest and config.
    pub(super) fn plan_docker(&self) -> Result<Plan> {
        let manifests: Vec<DockerManifest> =
            self.json("manifest.json", &self.part("manifest.json")?)?;
        let [manifest] = manifests.as_slice() else {
            let tags: Vec<&str> = manifests
                .iter()
                .filter_map(|manifest| manifest.repo_tags.as_ref()?.first().map(String::as_str))
                .collect();
            return Err(self.bad(format!(
                "it holds {} images ({}), we import one: save that one alone",
                manifests.len(),
                tags.join(", ")
            )));
        };
        let bytes = self.part(&manifest.config)?;
        let found = Hashing::new(bytes.as_slice())
            .finish()
            .at("hash", self.archive.as_ref())?;
        let name = manifest.config.rsplit('/').next().unwrap_or_default();
        let name = name.strip_suffix(".json").unwrap_or(name);
        if is_digest(name) && name != found {
            return Err(self.mismatch(name, "digest", found));
        }
        let config: ImageConfiguration = self.json(&manifest.config, &bytes)?;
        for layer in &manifest.layers {
            if !self.source.has(layer) {
                return Err(self.bad(format!("layer {layer} is missing: save the image again")));
            }
        }
        self.plan(manifest.layers.clone(), &config, found)
    }

    /// Whether `manifest.json` is docker's; a root file system could have a file of that name.
    pub(super) fn is_docker(&self) -> bool {
        let Ok(bytes) = self.part("manifest.json") else {
            return false;
        };
        serde_json::from_slice::<Vec<DockerManifest>>(&bytes).is_ok()
    }

    fn plan(
        &self,
        parts: Vec<String>,
        config: &ImageConfiguration,
        identity: String,
    ) -> Result<Plan> {
        if config.os() != &Os::Linux || config.architecture() != &Arch::Amd64 {
            return Err(self.bad(format!(
                "it is for {}/{}; this host runs linux/amd64: pull it with `--platform linux/amd64`",
                config.os(),
                config.architecture()
            )));
        }
        if parts.is_empty() {
            return Err(self.bad("it has no layers".into()));
        }
        if parts.len() as u64 > self.limits.layers {
            return Err(Error::OverLimit {
                archive: self.archive.to_owned(),
                what: "layers",
                limit: self.limits.layers,
            });
        }
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != parts.len() {
            return Err(self.bad(format!(
                "its manifest has {} layers and its config {}: it is damaged",
                parts.len(),
                diff_ids.len()
            )));
        }
        let layers = parts
            .into_iter()
            .zip(diff_ids)
            .map(|(part, diff_id)| match diff_id.strip_prefix("sha256:") {
                Some(hex) if is_digest(hex) => Ok(Layer {
                    part,
                    diff_id: hex.to_owned(),
                }),
                _ => Err(self.bad(format!("diff id `{diff_id}` is not a sha256 digest"))),
            })
            .collect::<Result<Vec<_>>>()?;
        let run = config.config().clone().unwrap_or_default();
        let text = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
        let container = ContainerConfig {
            env: run.env().clone().unwrap_or_default(),
            user: text(run.user()),
            workdir: text(run.working_dir()),
            entrypoint: run.entrypoint().clone().unwrap_or_default(),
            cmd: run.cmd().clone().unwrap_or_default(),
        };
        Ok(Plan {
            layers,
            container,
            identity,
        })
    }

    /// Unpacks all layers, lowest first.
    pub(super) fn unpack(&self, plan: &Plan, tree: &mut Tree) -> Result<()> {
        let budget = Budget::new(self.limits);
        for (number, layer) in plan.layers.iter().enumerate() {
            let shown = format!("{}: layer {}", self.archive, number + 1);
            self.progress.step(&format!(
                "unpacking layer {} of {}",
                number + 1,
                plan.layers.len()
            ));
            let Some((reader, _)) = self.source.open(&layer.part)? else {
                return Err(self.bad(format!("layer {} is missing", layer.part)));
            };
            let at = self.archive.as_ref();
            let mut hashing = Hashing::new(unpack(reader, &shown, &budget).at("read", at)?);
            tree.begin_layer(&shown);
            let mut archive = Archive::new(Box::new(hashing.by_ref()), &shown, &budget);
            while let Some(entry) = archive.next()? {
                if self.progress.cancelled() {
                    return Err(Error::Cancelled);
                }
                if !tree.whiteout(&entry)? {
                    tree.put(&entry, &mut archive, self.progress)?;
                }
            }
            drop(archive);
            let found = hashing.finish().at("read", at)?;
            if found != layer.diff_id {
                return Err(self.mismatch(&layer.part, "diff id", found));
            }
        }
        Ok(())
    }

    /// Picks the one image for linux/amd64.
    fn choose(&self, index: &ImageIndex, depth: usize) -> Result<Descriptor> {
        if depth >= MAX_INDEX_DEPTH {
            return Err(self.bad("its indexes lie more than 4 deep".into()));
        }
        let mut fits: Vec<&Descriptor> = index
            .manifests()
            .iter()
            .filter(|descriptor| match descriptor.platform() {
                Some(platform) => {
                    platform.os() == &Os::Linux && platform.architecture() == &Arch::Amd64
                }
                None => true, // The config says it, later.
            })
            .collect();
        fits.sort_by_key(|descriptor| descriptor.digest().digest().to_owned());
        fits.dedup_by_key(|descriptor| descriptor.digest().digest().to_owned());
        let [descriptor] = fits.as_slice() else {
            let reason = if fits.is_empty() {
                "its index has no image for linux/amd64: pull it with `--platform linux/amd64`"
                    .into()
            } else {
                format!(
                    "its index has {} images for linux/amd64, we import one: copy that one into a \
                     layout of its own",
                    fits.len()
                )
            };
            return Err(self.bad(reason));
        };
        match descriptor.media_type().as_ref() {
            "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v2+json" => Ok((*descriptor).clone()),
            "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json" => {
                let inner: ImageIndex = self.blob_json(descriptor)?;
                self.choose(&inner, depth + 1)
            }
            other => Err(self.bad(format!(
                "its index points at media type {other}, not an image"
            ))),
        }
    }

    fn sha256(&self, descriptor: &Descriptor) -> Result<String> {
        descriptor
            .as_digest_sha256()
            .map(str::to_owned)
            .ok_or_else(|| self.bad(format!("digest {} is not sha256", descriptor.digest())))
    }

    /// Checks a blob's size and digest without keeping it.
    fn verify(&self, descriptor: &Descriptor) -> Result<()> {
        let digest = self.sha256(descriptor)?;
        let Some((reader, length)) = self.source.open(&blob_name(&digest))? else {
            return Err(self.bad(format!("blob {digest} is missing: copy the image again")));
        };
        if length != descriptor.size() {
            return Err(self.mismatch(&digest, "size", format!("{length} bytes")));
        }
        let found = Hashing::new(reader)
            .finish()
            .at("read", self.archive.as_ref())?;
        if found == digest {
            Ok(())
        } else {
            Err(self.mismatch(&digest, "digest", found))
        }
    }

    fn blob_json<T: DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T> {
        self.verify(descriptor)?;
        let name = blob_name(&self.sha256(descriptor)?);
        self.json(&name, &self.part(&name)?)
    }

    fn part(&self, name: &str) -> Result<Vec<u8>> {
        self.source
            .read(name, &self.limits, self.archive)?
            .ok_or_else(|| self.bad(format!("it has no {name}")))
    }

    fn json<T: DeserializeOwned>(&self, name: &str, bytes: &[u8]) -> Result<T> {
        serde_json::from_slice(bytes)
            .map_err(|error| self.bad(format!("{name} does not parse ({error}): it is damaged")))
    }

    fn bad(&self, reason: String) -> Error {
        Error::BadManifest {
            archive: self.archive.to_owned(),
            reason,
        }
    }

    fn mismatch(&self, digest: &str, what: &'static str, found: String) -> Error {
        Error::DigestMismatch {
            archive: self.archive.to_owned(),
            digest: digest.to_owned(),
            what,
            found,
        }
    }
}

fn blob_name(digest: &str) -> String {
    format!("blobs/sha256/{digest}")
}

/// Layers that are tars, packed in a way that we read; the bytes say which.
fn check_layer_type(media_type: &str) -> Result<(), String> {
    let tar = media_type.strip_prefix("application/vnd.oci.image.layer.");
    let tar = tar.map(|rest| rest.strip_prefix("nondistributable.").unwrap_or(rest));
    let known = matches!(tar, Some("v1.tar" | "v1.tar+gzip" | "v1.tar+zstd"))
        || matches!(
            media_type,
            "application/vnd.docker.image.rootfs.diff.tar"
                | "application/vnd.docker.image.rootfs.diff.tar.gzip"
                | "application/vnd.docker.image.rootfs.diff.tar.zstd"
                | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
        );
    if known {
        Ok(())
    } else {
        Err(format!(
            "a layer has media type {media_type}; we read tars, plain, gzip or zstd"
        ))
    }
}
