use super::*;

pub(crate) fn config(id: &str) -> VmConfig {
    serde_json::from_value(serde_json::json!({
        "id": id, "vcpus": 1, "memory_mib": 128, "kernel": "/k"
    }))
    .unwrap()
}

fn sample() -> (tempfile::TempDir, VmDir, Record) {
    let temp = tempfile::tempdir().unwrap();
    let dir = VmDir::new(temp.path().join("0123456789ab"));
    std::fs::create_dir(dir.path()).unwrap();
    let record = Record::new(config("0123456789ab"), Some("x".into()), None);
    dir.write_record(&record).unwrap();
    (temp, dir, record)
}

#[test]
fn a_record_reads_back_as_it_was_written() {
    let (_temp, dir, record) = sample();
    assert_eq!(dir.read_record().unwrap(), record);
    assert!(!dir.path().join("record.tmp").exists());
}

#[test]
fn a_record_cut_short_at_any_byte_is_damaged() {
    let (_temp, dir, _) = sample();
    let whole = std::fs::read(dir.record()).unwrap();
    for len in 0..whole.len() {
        std::fs::write(dir.record(), &whole[..len]).unwrap();
        assert!(
            matches!(dir.read_record(), Err(RecordError::Damaged { .. })),
            "{len} bytes"
        );
    }
}

#[test]
fn a_record_of_a_later_ratoon_is_refused_by_its_format() {
    let (_temp, dir, _) = sample();
    std::fs::write(dir.record(), br#"{"format":2,"new":true}"#).unwrap();
    let error = dir.read_record().unwrap_err();
    assert!(
        matches!(error, RecordError::Format { format: 2, .. }),
        "{error}"
    );
}

#[test]
fn a_record_from_another_directory_is_refused() {
    let (temp, dir, _) = sample();
    let other = VmDir::new(temp.path().join("ffffffffffff"));
    std::fs::rename(dir.path(), other.path()).unwrap();
    let error = other.read_record().unwrap_err();
    assert!(
        matches!(&error, RecordError::Foreign { id, .. } if id == "0123456789ab"),
        "{error}"
    );
}

#[test]
fn only_what_nobody_will_use_again_is_abandoned() {
    let (_temp, _, mut record) = sample();
    assert!(!record.is_abandoned(), "its owner lives");
    record.owner.as_mut().unwrap().start_ticks += 1;
    assert!(record.is_abandoned());
    record.ready = true;
    assert!(record.is_abandoned(), "ephemeral");
    record.ephemeral = false;
    assert!(!record.is_abandoned());
    record.ready = false;
    assert!(record.is_abandoned(), "never handed out");
}
