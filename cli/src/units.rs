//! Sizes, durations and devices as people write them.

use std::time::Duration;

use ratoon_vmm_api::NetConfig;

/// Reads `256M`, `1G` (or `MiB`, `GiB`) as MiB.
pub fn memory_mib(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let factor = match unit.to_ascii_lowercase().as_str() {
        "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1024,
        "" => return Err(format!("give a unit: {text}M or {text}G")),
        _ => return Err(format!("unknown unit {unit:?}: write 256M or 1G")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| "write a whole number with its unit: 256M or 1G".to_owned())
}

/// Reads `500ms`, `10s`, `2m`, `1h`; a plain number is seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits
        .parse()
        .map_err(|_| "write a whole number with its unit: 500ms, 10s, 2m or 1h".to_owned())?;
    let seconds = |factor: u64| number.checked_mul(factor).map(Duration::from_secs);
    match &text[digits.len()..] {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3600),
        unit => return Err(format!("unknown unit {unit:?}: use ms, s, m or h")),
    }
    .ok_or_else(|| "that is too long".to_owned())
}

/// Reads `tap=NAME[,mac=02:…]`.
pub fn network(text: &str) -> Result<NetConfig, String> {
    let mut tap = None;
    let mut mac = None;
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("tap", name)) if !name.is_empty() => tap = Some(name.to_owned()),
            Some(("mac", address)) if !address.is_empty() => mac = Some(address.to_owned()),
            _ => return Err(format!("{part:?}: write tap=NAME or tap=NAME,mac=ADDRESS")),
        }
    }
    let tap = tap.ok_or("name the tap device: tap=NAME")?;
    Ok(NetConfig { tap, mac })
}

/// How long ago: `5s`, `3m`, `2h`, `4d`.
pub fn age(duration: Duration) -> String {
    match duration.as_secs() {
        s @ 0..60 => format!("{s}s"),
        s @ 60..3600 => format!("{}m", s / 60),
        s @ 3600..86400 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86400),
    }
}

/// How long ago a Unix time in milliseconds was; a time in the future is now.
pub fn age_of(unix_ms: u64) -> String {
    let then = std::time::UNIX_EPOCH + Duration::from_millis(unix_ms);
    age(then.elapsed().unwrap_or_default())
}

/// Bytes with a binary unit.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_needs_a_unit() {
        assert_eq!(memory_mib("256M"), Ok(256));
        assert_eq!(memory_mib("2GiB"), Ok(2048));
        assert_eq!(memory_mib("1g"), Ok(1024));
        assert_eq!(memory_mib("256").unwrap_err(), "give a unit: 256M or 256G");
        assert_eq!(
            memory_mib("1T").unwrap_err(),
            "unknown unit \"T\": write 256M or 1G"
        );
        for bad in [
            "M",
            "1.5G",
            "-1M",
            "99999999999999999999G",
            "18446744073709551615G",
        ] {
            assert_eq!(
                memory_mib(bad).unwrap_err(),
                "write a whole number with its unit: 256M or 1G",
                "{bad}"
            );
        }
    }

    #[test]
    fn a_plain_duration_is_in_seconds() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(
            duration("5d").unwrap_err(),
            "unknown unit \"d\": use ms, s, m or h"
        );
        assert_eq!(
            duration("18446744073709551615h").unwrap_err(),
            "that is too long"
        );
        assert!(
            duration("s")
                .unwrap_err()
                .starts_with("write a whole number")
        );
    }

    #[test]
    fn a_network_needs_its_tap() {
        let net = network("tap=t0,mac=02:00:00:00:00:01").unwrap();
        assert_eq!(net.tap, "t0");
        assert_eq!(net.mac.as_deref(), Some("02:00:00:00:00:01"));
        assert_eq!(
            network("mac=02:00:00:00:00:01").unwrap_err(),
            "name the tap device: tap=NAME"
        );
        assert_eq!(
            network("t0").unwrap_err(),
            "\"t0\": write tap=NAME or tap=NAME,mac=ADDRESS"
        );
    }

    #[test]
    fn ages_and_sizes_have_one_unit() {
        assert_eq!(age(Duration::from_secs(59)), "59s");
        assert_eq!(age(Duration::from_secs(3599)), "59m");
        assert_eq!(age(Duration::from_secs(86400 * 3)), "3d");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(300 << 30), "300 GiB");
    }
}
