use ratoon_protocol::ErrorCode;

use super::*;

#[test]
fn a_time_in_another_unit_is_refused() {
    let now = time(1_790_000_000_123_456).unwrap();
    assert_eq!((now.tv_sec, now.tv_nsec), (1_790_000_000, 123_456_000));
    for wrong in [
        0,
        1_790_000_000,
        1_790_000_000_000,
        1_790_000_000_000_000_000,
        u64::MAX,
    ] {
        let error = time(wrong).unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert!(
            error.message.starts_with(&format!("time_us {wrong} ")),
            "{error}"
        );
    }
}

#[test]
fn a_clock_is_right_if_it_has_run_since_it_was_told() {
    let at = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let told = at(1_790_000_000, 500_000_000);
    for now in [
        at(1_790_000_000, 250_000_000),
        told,
        at(1_790_000_002, 499_999_999),
    ] {
        assert!(is_right(now, told), "{now:?}");
    }
    for now in [
        at(1_790_000_000, 249_999_999),
        at(1_790_000_002, 500_000_000),
        at(0, 0),
        at(i64::MAX, 0),
    ] {
        assert!(!is_right(now, told), "{now:?}");
    }
}

#[test]
fn entropy_is_whole_bytes_of_hexadecimal_digits() {
    assert_eq!(entropy("00fF7a", 1).unwrap(), [0, 0xff, 0x7a]);
    assert_eq!(entropy(&"ab".repeat(512), 16).unwrap(), [0xab; 512]);
    for (hex, least) in [("", 1), ("a", 1), ("abc", 1), ("00", 16), ("é", 2)] {
        let error = entropy(hex, least).unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert!(error.message.starts_with("entropy of "), "{error}");
    }
    assert!(entropy(&"ab".repeat(513), 1).is_err());
    for hex in ["zz", "+1", " 1", "é", "0x"] {
        let expected = bad_request("entropy is not hexadecimal digits alone");
        assert_eq!(entropy(hex, 1), Err(expected), "{hex}");
    }
}

#[test]
fn the_kernel_takes_entropy_of_any_length_as_root() {
    for len in [1, 3, 4, 5, 512] {
        assert_eq!(
            apply_entropy(open_random().unwrap().as_fd(), &vec![7; len]),
            Ok(()),
            "{len}"
        );
    }
}

#[test]
fn a_hostname_is_parts_of_letters_and_digits() {
    let longest = "x".repeat(63);
    for name in ["a", "Box-1", "1.example.com", "a--b", longest.as_str()] {
        assert_eq!(check_hostname(name), Ok(()), "{name}");
    }
    let long = "x".repeat(64);
    for name in [
        "", ".", "-a", "a-", "a..b", ".a", "a.", "a.-b", "a_b", "a b", "a\n", "ä", "a/b", &long,
    ] {
        let error = check_hostname(name).unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest, "{name}");
        assert!(error.message.starts_with("hostname `"), "{error}");
    }
}

#[test]
fn the_old_name_goes_from_hosts_and_nothing_else_does() {
    let text = "127.0.0.1 localhost box # box is here\n10.0.0.1\tbox.example box\tboxer\nbox x\n";
    assert_eq!(
        renamed(text, "box", "new"),
        "127.0.0.1 localhost new # box is here\n10.0.0.1\tbox.example new\tboxer\nbox x\n"
    );
}

#[test]
fn a_name_that_is_nowhere_gets_a_line() {
    let text = "127.0.0.1\tlocalhost\n::1 localhost";
    let expected = "127.0.0.1\tlocalhost\n::1 localhost\n127.0.1.1\tnew\n";
    assert_eq!(renamed(text, "box", "new"), expected);
    assert_eq!(renamed(text, "localhost", "new"), expected);
    assert_eq!(renamed(expected, "localhost", "new"), expected);
    assert_eq!(
        renamed("", "box", "new"),
        "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\tnew\n"
    );
}

#[test]
fn hostname_and_hosts_follow_the_name() {
    let etc = tempfile::tempdir().unwrap();
    let read = |name: &str| std::fs::read_to_string(etc.path().join(name)).unwrap();
    std::fs::write(etc.path().join("hosts"), "127.0.1.1 old\n").unwrap();
    write_hostname(etc.path(), "old", "new", &mut Etc::default()).unwrap();
    assert_eq!(read("hostname"), "new\n");
    assert_eq!(read("hosts"), "127.0.1.1 new\n");
    // A root without /etc is as good as a read-only one.
    write_hostname(&etc.path().join("none"), "old", "new", &mut Etc::default()).unwrap();
}

#[test]
fn a_machine_id_is_lower_case_and_not_zero() {
    let id = "0123456789abcdef0123456789ABCDEF";
    assert_eq!(machine_id(id).unwrap(), id.to_ascii_lowercase());
    for wrong in [
        "",
        "0",
        &"0".repeat(32),
        &"g".repeat(32),
        &"a".repeat(33),
        &"é".repeat(16),
    ] {
        let error = machine_id(wrong).unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert!(error.message.starts_with("machine id `"), "{error}");
    }
}

#[test]
fn a_runtime_that_is_not_init_leaves_its_host_alone() {
    let time_us = 1_790_000_000_000_000;
    let hostname = "never".to_owned();
    for result in [
        set_time(&TimeSet { time_us }),
        set_hostname(&HostnameSet { hostname }),
        apply_machine_id("0123456789abcdef0123456789abcdef", &mut Etc::default()),
    ] {
        assert_eq!(result.unwrap_err().code, ErrorCode::Unsupported);
    }
}
