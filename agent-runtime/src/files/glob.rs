//! Patterns of names: `*`, `**`, `?`, `[a-z]`, `{a,b}`.
//!
//! How it fails: a pattern over one of the bounds below is refused when it is read. Then it may be
//! held against any path: the time is bounded by the product of the lengths.

/// How long a pattern may be, in bytes.
const MAX_LENGTH: usize = 4096;

/// How many alternatives `{…}` may make together.
const MAX_ALTERNATIVES: usize = 64;

/// How deep `{…}` may stand in each other.
const MAX_NESTING: usize = 8;

/// A pattern, ready to be held against paths.
#[derive(Debug, Clone)]
pub struct Glob {
    alternatives: Vec<Vec<Token>>,
    /// It is held against the whole path, not the last component.
    whole: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Char(char),
    /// `?`
    One,
    /// `[…]`: ranges, both ends included.
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
    /// `*`
    Star,
    /// `**`
    Stars,
}

impl Glob {
    /// Reads a pattern.
    ///
    /// # Errors
    /// What it has too much of.
    pub fn new(pattern: &str) -> Result<Self, String> {
        if pattern.len() > MAX_LENGTH {
            return Err(format!("the pattern has more than {MAX_LENGTH} bytes"));
        }
        let mut alternatives = vec![String::new()];
        expand(pattern, &mut alternatives, 0)?;
        Ok(Self {
            alternatives: alternatives.iter().map(|text| tokens(text)).collect(),
            whole: pattern.contains('/'),
        })
    }

    /// Whether a path below the directory that is listed fits.
    pub fn fits(&self, path: &str) -> bool {
        let text = match self.whole {
            true => path,
            false => path.rsplit('/').next().unwrap_or(path),
        };
        self.alternatives
            .iter()
            .any(|pattern| matches(pattern, text))
    }
}

/// Appends all that a pattern may mean to each of `made`.
fn expand(mut pattern: &str, made: &mut Vec<String>, nesting: usize) -> Result<(), String> {
    if nesting > MAX_NESTING {
        return Err(format!(
            "the pattern has braces more than {MAX_NESTING} deep"
        ));
    }
    while let Some(open) = pattern.find('{')
        && let Some(close) = closing(&pattern[open..]).map(|at| open + at)
    {
        made.iter_mut()
            .for_each(|text| text.push_str(&pattern[..open]));
        let mut all = Vec::new();
        for choice in split(&pattern[open + 1..close]) {
            let mut with = made.clone();
            expand(choice, &mut with, nesting + 1)?;
            all.extend(with);
            if all.len() > MAX_ALTERNATIVES {
                return Err(format!(
                    "the pattern has more than {MAX_ALTERNATIVES} alternatives"
                ));
            }
        }
        *made = all;
        pattern = &pattern[close + 1..];
    }
    made.iter_mut().for_each(|text| text.push_str(pattern));
    Ok(())
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

/// Reads a pattern without alternatives.
fn tokens(text: &str) -> Vec<Token> {
    let text: Vec<char> = text.chars().collect();
    let (mut tokens, mut at) = (Vec::new(), 0);
    while let Some(&c) = text.get(at) {
        at += 1;
        tokens.push(match c {
            '?' => Token::One,
            '*' if text.get(at) == Some(&'*') => {
                at += 1;
                Token::Stars
            }
            '*' => Token::Star,
            '[' => match class(&text[at..]) {
                Some((class, len)) => {
                    at += len;
                    class
                }
                None => Token::Char('['),
            },
            c => Token::Char(c),
        });
    }
    tokens
}

/// Reads what stands behind a `[`, and how long it is; `None` when the class has no end.
fn class(text: &[char]) -> Option<(Token, usize)> {
    let negated = matches!(text.first(), Some('!' | '^'));
    let start = usize::from(negated);
    // A `]` that comes first is one of the class.
    let behind = text.get(start + 1..)?;
    let end = start + 1 + behind.iter().position(|&c| c == ']')?;
    let (mut ranges, mut at) = (Vec::new(), start);
    while at < end {
        if text[at + 1] == '-' && at + 2 < end {
            ranges.push((text[at], text[at + 2]));
            at += 3;
        } else {
            ranges.push((text[at], text[at]));
            at += 1;
        }
    }
    Some((Token::Class { negated, ranges }, end + 1))
}

impl Token {
    /// Whether it may stand for this one character.
    fn takes(&self, c: char) -> bool {
        match self {
            Self::Char(own) => *own == c,
            Self::One | Self::Star => c != '/',
            Self::Class { negated, ranges } => {
                let inside = ranges.iter().any(|&(from, to)| (from..=to).contains(&c));
                inside != *negated && c != '/'
            }
            Self::Stars => true,
        }
    }

    fn is_star(&self) -> bool {
        matches!(self, Self::Star | Self::Stars)
    }
}

/// Takes the text a character at a time and keeps all places of the pattern that it may have come to.
fn matches(pattern: &[Token], text: &str) -> bool {
    let mut places = vec![false; pattern.len() + 1];
    places[0] = true;
    pass_stars(pattern, &mut places, true);
    let mut next = places.clone();
    for c in text.chars() {
        next.fill(false);
        for (p, token) in pattern.iter().enumerate() {
            if places[p] && token.takes(c) {
                next[p + usize::from(!token.is_star())] = true;
            }
        }
        std::mem::swap(&mut places, &mut next);
        pass_stars(pattern, &mut places, c == '/');
    }
    places[pattern.len()]
}

/// A star may stand for nothing; `**/`, where a component begins, for no directory at all.
fn pass_stars(pattern: &[Token], places: &mut [bool], begins: bool) {
    for (p, token) in pattern.iter().enumerate() {
        if places[p] && token.is_star() {
            places[p + 1] = true;
            let slash = pattern.get(p + 1) == Some(&Token::Char('/'));
            if begins && *token == Token::Stars && slash {
                places[p + 2] = true;
            }
        }
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
    fn many_stars_take_no_more_time_than_few() {
        let begun = std::time::Instant::now();
        let path = "a/".repeat(2000);
        assert!(!fits(&("**/".repeat(600) + "x"), &format!("{path}y")));
        assert!(fits(&("**/".repeat(600) + "x"), &format!("{path}x")));
        assert!(fits("**/*/x", "a/x") && !fits("**/*/x", "x"));
        assert!(begun.elapsed() < std::time::Duration::from_secs(10));
    }

    #[test]
    fn a_pattern_that_explodes_is_refused_and_a_nasty_one_ends() {
        let refused = |pattern: String| Glob::new(&pattern).unwrap_err();
        assert!(refused("{a,b}".repeat(20)).contains("64 alternatives"));
        assert!(refused("{".repeat(9) + &"}".repeat(9)).contains("8 deep"));
        assert!(refused("{".repeat(20_000) + &"}".repeat(20_000)).contains("4096 bytes"));
        assert!(fits(&"{a}".repeat(1300), &"a".repeat(1300)));
        assert!(!fits(
            &"*a".repeat(30),
            &"a".repeat(200).replace("aaaaa", "aaaab").replace('b', "c")
        ));
    }
}
