//! What this host's processor offers, for machines that have seen it and are to go on elsewhere.

use std::arch::x86_64::__cpuid_count;

use ratoon_snapshot::Cpu;

/// Leaf, subleaf and registers (0 EAX to 3 EDX) whose bits are features (Intel SDM volume 2, CPUID).
const WORDS: [(u32, u32, usize); 7] = [
    (1, 0, 2),
    (1, 0, 3),
    (7, 0, 1),
    (7, 0, 2),
    (7, 0, 3),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
];

fn leaf(leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = __cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// This host's.
pub(crate) fn here() -> Cpu {
    let [_, ebx, ecx, edx] = leaf(0, 0);
    let vendor: Vec<u8> = [ebx, edx, ecx]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .filter(u8::is_ascii_graphic)
        .collect();
    Cpu {
        vendor: String::from_utf8_lossy(&vendor).into_owned(),
        features: WORDS
            .iter()
            .map(|&(number, subleaf, register)| {
                let word = leaf(number, subleaf)[register];
                format!("{number:x}.{subleaf:x}.{register}={word:08x}")
            })
            .collect(),
    }
}

/// What `saved` has and `host` lacks, in words; `None`: nothing.
pub(crate) fn missing(saved: &Cpu, host: &Cpu) -> Option<String> {
    if saved.vendor != host.vendor {
        return Some(format!(
            "it needs a processor of {}, this one is of {}",
            saved.vendor, host.vendor
        ));
    }
    let bits = |word: &str| {
        let (name, bits) = word.split_once('=')?;
        Some((name.to_owned(), u32::from_str_radix(bits, 16).ok()?))
    };
    let ours: Vec<_> = host.features.iter().filter_map(|word| bits(word)).collect();
    for word in &saved.features {
        let Some((name, needed)) = bits(word) else {
            return Some(format!("its feature word `{}`", word.escape_debug()));
        };
        let offered = ours
            .iter()
            .find(|(other, _)| *other == name)
            .map_or(0, |(_, bits)| *bits);
        let lacking = needed & !offered;
        if lacking != 0 {
            return Some(format!(
                "this processor lacks features {lacking:#x} of CPUID {name}"
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_offers_what_it_offers_and_no_more() {
        let host = here();
        assert!(!host.vendor.is_empty());
        assert_eq!(missing(&host, &host), None);
        let mut poorer = host.clone();
        poorer.features[1] = "1.0.3=00000000".into();
        assert!(missing(&host, &poorer).unwrap().contains("1.0.3"));
        assert_eq!(missing(&poorer, &host), None);
        let other = Cpu {
            vendor: "Other".into(),
            ..host.clone()
        };
        assert!(missing(&other, &host).unwrap().contains("Other"));
    }
}
