//! What opens and closes the gate.

use super::*;

fn figure(name: &str, value: Result<f64, String>) -> Measured {
    Measured {
        name: name.into(),
        unit: "count",
        value,
        tolerance: Tolerance {
            percent: 5.0,
            absolute: 2.0,
        },
        look: "vmm/src/start.rs",
    }
}

fn baseline(value: f64) -> Baseline {
    Baseline::empty().renewed("emulated", &[figure("ioctls", Ok(value))], "then".into())
}

#[test]
fn a_figure_within_its_tolerance_leaves_the_gate_open() {
    for value in [200.0, 210.0, 190.0] {
        let (text, open) = check(&baseline(200.0), "emulated", &[figure("ioctls", Ok(value))]);
        assert!(open && text.contains("ok      ioctls"), "{text}");
    }
    // Of small counts the absolute tolerance counts.
    let (text, open) = check(&baseline(10.0), "emulated", &[figure("ioctls", Ok(12.0))]);
    assert!(open, "{text}");
}

#[test]
fn a_figure_that_grew_closes_the_gate_and_says_by_how_much_and_where_to_look() {
    let (text, open) = check(&baseline(200.0), "emulated", &[figure("ioctls", Ok(211.0))]);
    assert!(!open);
    assert!(
        text.contains("WORSE   ioctls: 211 count, was 200: +11.0 (+5.5 %)"),
        "{text}"
    );
    assert!(text.contains("look at vmm/src/start.rs"), "{text}");
    assert!(text.contains("--renew"), "{text}");
}

#[test]
fn a_figure_that_shrank_is_told_and_leaves_the_gate_open() {
    let (text, open) = check(&baseline(200.0), "emulated", &[figure("ioctls", Ok(100.0))]);
    assert!(open && text.contains("better  ioctls"), "{text}");
}

#[test]
fn another_class_of_host_has_no_baseline_and_what_cannot_be_measured_is_not_failed() {
    let (text, open) = check(&baseline(200.0), "hardware", &[figure("ioctls", Ok(900.0))]);
    assert!(open && text.contains("new     ioctls"), "{text}");
    let missing = figure("ioctls", Err("no strace here".into()));
    let (text, open) = check(&baseline(200.0), "emulated", &[missing]);
    assert!(
        open && text.contains("n/a     ioctls: no strace here"),
        "{text}"
    );
    let (text, _) = check(&baseline(200.0), "emulated", &[]);
    assert!(text.contains("gone    ioctls"), "{text}");
}

#[test]
fn renewal_keeps_tolerances_and_what_this_host_cannot_measure() {
    let mut before = baseline(200.0);
    let class = before.classes.get_mut("emulated").expect("it is there");
    let committed = class.figures.get_mut("ioctls").expect("it is there");
    committed.tolerance.percent = 1.0;
    let kept = before.clone().renewed(
        "emulated",
        &[figure("ioctls", Err("no".into()))],
        "now".into(),
    );
    assert_eq!(kept.classes["emulated"].figures["ioctls"].value, 200.0);
    let renewed = before.renewed("emulated", &[figure("ioctls", Ok(90.0))], "now".into());
    let figure = &renewed.classes["emulated"].figures["ioctls"];
    assert_eq!((figure.value, figure.tolerance.percent), (90.0, 1.0));
}

#[test]
fn a_baseline_that_is_none_is_refused_in_words() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("baseline.json");
    let refusal = |text: &str| {
        std::fs::write(&path, text).expect("written");
        format!("{:#}", Baseline::read(&path).expect_err("refused"))
    };
    assert!(refusal("garbage").contains("not a baseline"));
    assert!(refusal("{\"schema\":9,\"classes\":{}}").contains("schema 9"));
    let mut below = baseline(1.0);
    let class = below.classes.get_mut("emulated").expect("it is there");
    class.figures.get_mut("ioctls").expect("it is there").value = -1.0;
    let text = serde_json::to_string(&below).expect("JSON");
    assert!(refusal(&text).contains("ioctls: a number below zero"));
    let missing = Baseline::read(&dir.path().join("no")).expect_err("refused");
    assert!(format!("{missing:#}").contains("--baseline"), "{missing:#}");
}
