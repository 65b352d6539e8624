//! OCI layouts and docker archives.

use super::*;
use crate::image::stream::{Hashing, hex};
use serde_json::{Value, json};

fn sha256(bytes: &[u8]) -> String {
    Hashing::new(bytes).finish().unwrap()
}

/// A layout in the making: parts by name.
struct Layout {
    parts: Vec<(String, Vec<u8>)>,
    layers: Vec<(String, Vec<u8>, Vec<u8>)>,
    architecture: &'static str,
}

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

impl Layout {
    fn new() -> Self {
        let marker = (
            String::from("oci-layout"),
            br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
        );
        Self {
            parts: vec![marker],
            layers: Vec::new(),
            architecture: "amd64",
        }
    }

    fn layer(mut self, media_type: &str, tar: Vec<u8>) -> Self {
        use std::io::Write as _;
        let packed = if media_type.ends_with("gzip") {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(&tar).unwrap();
            gzip.finish().unwrap()
        } else {
            tar.clone()
        };
        self.layers.push((media_type.to_owned(), packed, tar));
        self
    }

    fn config(&self) -> Vec<u8> {
        let diff_ids: Vec<String> = self
            .layers
            .iter()
            .map(|(_, _, tar)| format!("sha256:{}", sha256(tar)))
            .collect();
        serde_json::to_vec(&json!({
            "architecture": self.architecture, "os": "linux",
            "config": {"Env": ["A=b"], "User": "app:app", "WorkingDir": "/srv",
                       "Entrypoint": ["/bin/e"], "Cmd": ["c", "d"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }))
        .unwrap()
    }

    fn blob(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = sha256(&bytes);
        let descriptor = json!({"mediaType": media_type, "size": bytes.len(),
                                "digest": format!("sha256:{digest}")});
        self.parts.push((format!("blobs/sha256/{digest}"), bytes));
        descriptor
    }

    /// All parts, with an index whose other image is for another machine.
    fn parts(mut self) -> Vec<(String, Vec<u8>)> {
        let config = self.config();
        let config = self.blob("application/vnd.oci.image.config.v1+json", config);
        let layers: Vec<Value> = std::mem::take(&mut self.layers)
            .into_iter()
            .map(|(media_type, packed, _)| self.blob(&media_type, packed))
            .collect();
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        let mut manifest = self.blob(
            "application/vnd.oci.image.manifest.v1+json",
            serde_json::to_vec(&manifest).unwrap(),
        );
        manifest["platform"] = json!({"os": "linux", "architecture": "amd64"});
        let mut other = manifest.clone();
        other["platform"]["architecture"] = "arm64".into();
        other["digest"] = format!("sha256:{}", hex(&[7; 32])).into();
        let inner = json!({"schemaVersion": 2, "manifests": [other, manifest]});
        let inner = self.blob(
            "application/vnd.oci.image.index.v1+json",
            serde_json::to_vec(&inner).unwrap(),
        );
        let index = json!({"schemaVersion": 2, "manifests": [inner]});
        self.parts
            .push(("index.json".into(), serde_json::to_vec(&index).unwrap()));
        self.parts
    }
}

fn pack(parts: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut tar = Tar::new();
    for (name, bytes) in parts {
        tar = tar.entry(EntryType::Regular, name, "", 0o644, bytes);
    }
    tar.done()
}

fn import(parts: &[(String, Vec<u8>)]) -> (Lab, Result<Image>) {
    let lab = Lab::new();
    let image = lab.import(&lab.write("image.tar", &pack(parts)), None);
    (lab, image)
}

fn base() -> Vec<u8> {
    Tar::new()
        .folder("usr/lib")
        .symlink("lib", "usr/lib")
        .file("keep", "kept")
        .file("gone", "x")
        .folder("opaque")
        .file("opaque/old", "x")
        .folder("opaque/sub")
        .file("opaque/sub/old", "x")
        .file("dir/deep/file", "x")
        .done()
}

fn upper() -> Vec<u8> {
    Tar::new()
        .file(".wh.gone", "")
        .file("opaque/new", "new")
        .file("opaque/sub/new", "new")
        .file("opaque/.wh..wh..opq", "")
        .file(".wh.dir", "")
        .file("lib/through", "in usr/lib")
        .hard_link("kept-too", "keep")
        .file("again", "this layer's")
        .file(".wh.again", "")
        .done()
}

fn check_merged(image: &Image) {
    assert_sound(image);
    assert_eq!(content(image, "/keep"), "kept");
    assert_eq!(content(image, "/kept-too"), "kept");
    assert!(!exists(image, "/gone"), "whiteout");
    assert!(!exists(image, "/.wh.gone"));
    assert!(!exists(image, "/dir"), "whiteout of a folder");
    assert!(!exists(image, "/opaque/old"), "opaque");
    assert!(!exists(image, "/opaque/sub/old"), "opaque, below");
    assert_eq!(content(image, "/opaque/new"), "new");
    assert_eq!(content(image, "/opaque/sub/new"), "new");
    assert_eq!(content(image, "/usr/lib/through"), "in usr/lib");
    assert_eq!(
        content(image, "/again"),
        "this layer's",
        "a whiteout hides lower layers only"
    );
    let run = &image.config.container;
    assert_eq!(run.env, ["A=b"]);
    assert_eq!(run.user.as_deref(), Some("app:app"));
    assert_eq!(run.workdir.as_deref(), Some("/srv"));
    assert_eq!(run.entrypoint, ["/bin/e"]);
    assert_eq!(run.cmd, ["c", "d"]);
}

#[test]
fn an_oci_tar_is_merged_layer_by_layer() {
    let (_lab, image) = import(
        &Layout::new()
            .layer(GZIP, base())
            .layer(PLAIN, upper())
            .parts(),
    );
    check_merged(&image.unwrap());
}

#[test]
fn an_oci_folder_is_merged_layer_by_layer() {
    let lab = Lab::new();
    let folder = lab.path("layout");
    fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    for (name, bytes) in Layout::new()
        .layer(PLAIN, base())
        .layer(GZIP, upper())
        .parts()
    {
        fs::write(folder.join(name), bytes).unwrap();
    }
    check_merged(&lab.import(&folder, None).unwrap());
}

#[test]
fn a_docker_archive_is_merged_layer_by_layer() {
    let layout = Layout::new().layer(PLAIN, base()).layer(PLAIN, upper());
    let config = layout.config();
    let name = format!("{}.json", sha256(&config));
    let manifest =
        json!([{"Config": name, "RepoTags": ["a:1"], "Layers": ["1/layer.tar", "2/layer.tar"]}]);
    let tar = Tar::new()
        .entry(EntryType::Regular, "real.tar", "", 0o644, &base())
        .symlink("1/layer.tar", "../real.tar")
        .entry(EntryType::Regular, "2/layer.tar", "", 0o644, &upper())
        .entry(EntryType::Regular, &name, "", 0o644, &config)
        .file("manifest.json", &manifest.to_string())
        .done();
    let lab = Lab::new();
    let image = lab.import(&lab.write("saved.tar", &tar), None).unwrap();
    check_merged(&image);
    assert_eq!(image.config.source, "docker archive saved.tar");
}

#[test]
fn a_changed_blob_is_refused() {
    let mut parts = Layout::new().layer(PLAIN, base()).parts();
    let layer = parts
        .iter_mut()
        .find(|(_, bytes)| bytes.len() > 2000)
        .unwrap();
    let name = layer.0.clone();
    layer.1[600] ^= 1;
    let (lab, result) = import(&parts);
    match result {
        Err(Error::DigestMismatch { digest, what, .. }) => {
            assert_eq!((name, what), (format!("blobs/sha256/{digest}"), "digest"));
        }
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn a_blob_of_another_size_is_refused() {
    let mut parts = Layout::new().layer(PLAIN, base()).parts();
    parts
        .iter_mut()
        .find(|(_, bytes)| bytes.len() > 2000)
        .unwrap()
        .1
        .push(0);
    match import(&parts).1 {
        Err(Error::DigestMismatch { what, .. }) => assert_eq!(what, "size"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_layer_that_unpacks_to_something_else_is_refused() {
    let mut layout = Layout::new().layer(PLAIN, base());
    layout.layers[0].2 = upper();
    let (lab, result) = import(&layout.parts());
    match result {
        Err(Error::DigestMismatch { what, .. }) => assert_eq!(what, "diff id"),
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn a_missing_blob_is_named() {
    let mut parts = Layout::new().layer(PLAIN, base()).parts();
    parts.retain(|(_, bytes)| bytes.len() <= 2000);
    match import(&parts).1 {
        Err(Error::BadManifest { reason, .. }) => {
            assert!(
                reason.ends_with("is missing: copy the image again"),
                "{reason}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_layer_of_an_unknown_media_type_is_refused() {
    let layout = Layout::new().layer("application/vnd.example.squashfs", base());
    match import(&layout.parts()).1 {
        Err(Error::BadManifest { reason, .. }) => assert_eq!(
            reason,
            "a layer has media type application/vnd.example.squashfs; we read tars, plain, gzip or zstd"
        ),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_image_for_another_machine_is_refused() {
    let mut layout = Layout::new().layer(PLAIN, base());
    layout.architecture = "arm64";
    match import(&layout.parts()).1 {
        Err(Error::BadManifest { reason, .. }) => {
            assert!(reason.starts_with("it is for linux/arm64"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_traversal_inside_a_layer_is_refused() {
    let layer = Tar::new().file("../outside", "x").done();
    match import(&Layout::new().layer(PLAIN, layer).parts()).1 {
        Err(Error::RefusedEntry { archive, entry, .. }) => {
            assert_eq!(
                (archive.as_str(), entry.as_str()),
                ("image.tar: layer 1", "../outside")
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_whiteout_of_dot_dot_is_refused() {
    let layer = Tar::new().file("a/.wh...", "").done();
    let lower = Tar::new().file("a/x", "").done();
    match import(
        &Layout::new()
            .layer(PLAIN, lower)
            .layer(PLAIN, layer)
            .parts(),
    )
    .1
    {
        Err(Error::RefusedEntry { reason, .. }) => {
            assert_eq!(reason, "it is a whiteout of nothing")
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_docker_archive_of_two_images_is_refused_by_name() {
    let one = |tag: &str| json!({"Config": "c.json", "RepoTags": [tag], "Layers": []});
    let manifest = json!([one("a:1"), one("b:2")]).to_string();
    let lab = Lab::new();
    let source = lab.write(
        "two.tar",
        &Tar::new().file("manifest.json", &manifest).done(),
    );
    match lab.import(&source, None) {
        Err(Error::BadManifest { reason, .. }) => assert_eq!(
            reason,
            "it holds 2 images (a:1, b:2), we import one: save that one alone"
        ),
        other => panic!("{other:?}"),
    }
}
