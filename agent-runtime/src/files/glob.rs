//! Patterns of names: `*`, `**`, `?`, `[a-z]`, `{a,b}`.

/// How many alternatives `{…}` may make together.
const MAX_ALTERNATIVES: usize = 64;

/// A pattern, ready to be held against paths.
#[derive(Debug, Clone)]
pub struct Glob {
    alternatives: Vec<Vec<char>>,
    /// It is held against the whole path, not the last component.
    whole: bool,
}

impl Glob {
    /// Reads a pattern; `None` when it has too many alternatives.
    pub fn new(pattern: &str) -> Option<Self> {
        let mut alternatives = vec![String::new()];
        expand(pattern, &mut alternatives)?;
        Some(Self {
            alternatives: alternatives
                .iter()
                .map(|text| text.chars().collect())
                .collect(),
            whole: pattern.contains('/'),
        })
    }

    /// Whether a path below the directory that is listed fits.
    pub fn fits(&self, path: &str) -> bool {
        let text = match self.whole {
            true => path,
            false => path.rsplit('/').next().unwrap_or(path),
        };
        let text: Vec<char> = text.chars().collect();
        self.alternatives
            .iter()
            .any(|pattern| matches(pattern, &text))
    }
}

/// Appends all that a pattern may mean to each of `made`.
fn expand(pattern: &str, made: &mut Vec<String>) -> Option<()> {
    let Some(open) = pattern.find('{') else {
        made.iter_mut().for_each(|text| text.push_str(pattern));
        return Some(());
    };
    let Some(close) = closing(&pattern[open..]).map(|at| open + at) else {
        made.iter_mut().for_each(|text| text.push_str(pattern));
        return Some(());
    };
    made.iter_mut()
        .for_each(|text| text.push_str(&pattern[..open]));
    let mut all = Vec::new();
    for choice in split(&pattern[open + 1..close]) {
        let mut with = made.clone();
        expand(choice, &mut with)?;
        all.extend(with);
        if all.len() > MAX_ALTERNATIVES {
            return None;
        }
    }
    *made = all;
    expand(&pattern[close + 1..], made)
}

/// Where the brace closes with which `text` begins.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

/// Cuts at the commas that stand in no brace.
fn split(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            b',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// The usual walk with one place to come back to for each kind of star: time is bounded by the
/// product of the lengths.
fn matches(pattern: &[char], text: &[char]) -> bool {
    let (mut p, mut t) = (0, 0);
    // For `*` and `**`: the pattern behind it, and the text that it has not yet taken.
    let mut star: Option<(usize, usize)> = None;
    let mut stars: Option<(usize, usize)> = None;
    loop {
        if let Some(&c) = pattern.get(p) {
            if c == '*' {
                if pattern.get(p + 1) == Some(&'*') {
                    p += 2;
                    // `**/` may stand for no directory at all.
                    if pattern.get(p) == Some(&'/') && (t == 0 || text.get(t - 1) == Some(&'/')) {
                        let rest = &pattern[p + 1..];
                        if matches(rest, &text[t..]) {
                            return true;
                        }
                    }
                    stars = Some((p, t));
                    star = None;
                } else {
                    p += 1;
                    star = Some((p, t));
                }
                continue;
            }
            if let Some(&found) = text.get(t)
                && let Some(next) = one(pattern, p, found)
            {
                p = next;
                t += 1;
                continue;
            }
        } else if t == text.len() {
            return true;
        }
        if let Some((behind, taken)) = star
            && text.get(taken).is_some_and(|&c| c != '/')
        {
            star = Some((behind, taken + 1));
            (p, t) = (behind, taken + 1);
        } else if let Some((behind, taken)) = stars
            && taken < text.len()
        {
            stars = Some((behind, taken + 1));
            star = None;
            (p, t) = (behind, taken + 1);
        } else {
            return false;
        }
    }
}

/// Whether one character fits the pattern at `p`; then, where the pattern goes on.
fn one(pattern: &[char], p: usize, found: char) -> Option<usize> {
    match pattern[p] {
        '?' => (found != '/').then_some(p + 1),
        '[' => {
            let negated = matches!(pattern.get(p + 1), Some('!' | '^'));
            let start = p + 1 + usize::from(negated);
            let behind = pattern.get(start + 1..).unwrap_or_default();
            let Some(len) = behind.iter().position(|&c| c == ']') else {
                return (found == '[').then_some(p + 1);
            };
            let class = &pattern[start..start + 1 + len];
            let mut inside = false;
            let mut at = 0;
            while at < class.len() {
                if class.get(at + 1) == Some(&'-') && at + 2 < class.len() {
                    inside |= (class[at]..=class[at + 2]).contains(&found);
                    at += 3;
                } else {
                    inside |= class[at] == found;
                    at += 1;
                }
            }
            (inside != negated && found != '/').then_some(start + len + 2)
        }
        c => (c == found).then_some(p + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(pattern: &str, path: &str) -> bool {
        Glob::new(pattern).unwrap().fits(path)
    }

    #[test]
    fn a_star_stays_in_its_directory_and_two_do_not() {
        assert!(fits("*.rs", "src/main.rs"));
        assert!(fits("src/*.rs", "src/main.rs"));
        assert!(!fits("src/*.rs", "src/a/main.rs"));
        assert!(fits("src/**", "src/a/b/c"));
        assert!(fits("**/c", "a/b/c"));
        assert!(fits("**/c", "c"));
        assert!(fits("src/**/c", "src/c"));
        assert!(!fits("src/**/c", "src/ac"));
        assert!(!fits("*.rs", "main.rsx"));
    }

    #[test]
    fn classes_alternatives_and_single_characters() {
        assert!(fits("[a-c]?.{txt,md}", "b1.md"));
        assert!(!fits("[!a-c]?.{txt,md}", "b1.md"));
        assert!(fits("{a,b{c,d}}x", "bdx"));
        assert!(!fits("{a,b{c,d}}x", "bx"));
        assert!(fits("a{b", "a{b"));
        assert!(fits("[", "["));
        assert!(fits("[]]", "]"));
    }

    #[test]
    fn a_pattern_that_explodes_is_refused_and_a_nasty_one_ends() {
        assert!(Glob::new(&"{a,b}".repeat(20)).is_none());
        assert!(!fits(
            &"*a".repeat(30),
            &"a".repeat(200).replace("aaaaa", "aaaab").replace('b', "c")
        ));
    }
}
