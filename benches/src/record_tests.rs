//! What of a file is read, and what is refused in which words.

use super::*;

fn header() -> String {
    let record = Record::Run {
        schema: SCHEMA,
        host: Box::new(Host::default()),
        quick: false,
    };
    serde_json::to_string(&record).unwrap() + "\n"
}

const SAMPLE: &str = "{\"kind\":\"sample\",\"scenario\":\"start\",\"system\":\"ratoon\",\"metric\":\"x\",\
                      \"unit\":\"ms\",\"readiness\":\"R1\",\"round\":1,\"value\":5.5}\n";

fn read_text(text: &str) -> Result<Recorded> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("samples.jsonl");
    std::fs::write(&path, text).unwrap();
    read(&path)
}

fn refusal(text: &str) -> String {
    format!("{:#}", read_text(text).unwrap_err())
}

#[test]
fn a_line_s_shape_is_what_the_documentation_says() {
    let read = read_text(&(header() + SAMPLE)).unwrap();
    let Record::Sample(sample) = &read.records[1] else {
        panic!("{:?}", read.records);
    };
    assert_eq!(sample.value, 5.5);
    assert_eq!(sample.series.readiness, Readiness::R1);
    assert_eq!((sample.at_s, sample.start_s), (0.0, None));
}

#[test]
fn a_last_line_without_its_end_is_left_out_and_told() {
    let read = read_text(&(header() + SAMPLE + &SAMPLE[..40])).unwrap();
    assert_eq!(read.records.len(), 2);
    assert!(read.torn.unwrap().contains("the last line (3)"));
}

#[test]
fn garbage_is_refused_with_its_line() {
    let message = refusal(&(header() + SAMPLE + "garbage\n" + SAMPLE));
    assert!(
        message.contains("line 3: not a line of `ratoon bench`"),
        "{message}"
    );
    let message = refusal("\u{7f}ELF\u{1}\u{1}");
    assert!(message.contains("line 1: not a line"), "{message}");
    let message = refusal(SAMPLE);
    assert!(message.contains("the file's begin is missing"), "{message}");
    let message = refusal(&(header() + &header()));
    assert!(message.contains("a second run begins"), "{message}");
}

#[test]
fn a_file_that_is_empty_missing_or_a_folder_is_refused() {
    assert!(refusal("").contains("is empty"), "{}", refusal(""));
    let dir = tempfile::tempdir().unwrap();
    let message = format!("{:#}", read(dir.path()).unwrap_err());
    assert!(message.contains("is a folder"), "{message}");
    let message = format!("{:#}", read(&dir.path().join("no")).unwrap_err());
    assert!(message.contains("No such file"), "{message}");
}

#[test]
fn another_schema_is_refused_with_what_to_do() {
    let message = refusal(&header().replace("\"schema\":2", "\"schema\":99"));
    assert!(message.contains("schema 99, this one reads 2"), "{message}");
    assert!(message.contains("measure again"), "{message}");
}

#[test]
fn a_value_that_is_no_number_is_refused() {
    let message = refusal(&(header() + &SAMPLE.replace("5.5", "\"5\"")));
    assert!(message.contains("line 2"), "{message}");
}

#[test]
fn a_line_longer_than_any_of_ours_is_refused_without_being_read() {
    let message = refusal(&(header() + &"x".repeat(2 << 20)));
    assert!(message.contains("too long"), "{message}");
}
