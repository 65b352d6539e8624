//! The page's pictures, distributions as SVG, a start by its phases and memory as bars. Colours are classes
//! (`s0` …) that the page's style gives a light and a dark value; each line has a dash of its own,
//! too. It cannot fail; a picture of nothing is empty.

use std::fmt::Write as _;

use super::page::escape;
use crate::stats::number;

const WIDTH: f64 = 540.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 42.0;
/// More points than this are not seen.
const POINTS: usize = 400;
/// But each of the slowest is drawn.
const TAIL: usize = 25;

/// One line of a distribution: the system's name and colour, and its samples, ascending.
pub struct Line<'a> {
    /// Whose.
    pub system: &'a str,
    /// Number of its colour.
    pub colour: usize,
    /// Ascending.
    pub sorted: &'a [f64],
}

/// A logarithmic axis.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    /// Around all positive values, with some room.
    fn around(lines: &[Line<'_>]) -> Option<Self> {
        let values = lines.iter().flat_map(|line| line.sorted.iter().copied());
        let values: Vec<f64> = values.filter(|value| *value > 0.0).collect();
        let low = values.iter().copied().reduce(f64::min)?;
        let high = values.iter().copied().reduce(f64::max)?;
        // A narrow distribution is not blown up to the whole width: noise would look like news.
        let room = if high / low < 1.6 {
            (1.6 / (high / low)).sqrt()
        } else {
            1.04
        };
        Some(Self {
            low: low / room,
            high: high * room,
        })
    }

    fn x(&self, value: f64) -> f64 {
        let share = (value.max(self.low) / self.low).ln() / (self.high / self.low).ln();
        LEFT + share.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    /// Round values to name.
    fn ticks(&self) -> Vec<f64> {
        let decades = (self.high / self.low).log10();
        let steps: &[f64] = match decades {
            d if d > 3.0 => &[1.0],
            d if d > 1.2 => &[1.0, 2.0, 5.0],
            d if d > 0.4 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0],
            _ => &[
                1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0, 2.2, 2.5, 2.8, 3.0, 3.5, 4.0, 4.5,
                5.0, 5.5, 6.0, 7.0, 8.0, 9.0,
            ],
        };
        let mut ticks = Vec::new();
        let first = self.low.log10().floor() as i32;
        let last = self.high.log10().ceil() as i32;
        for decade in first..=last {
            for step in steps {
                let value = step * 10_f64.powi(decade);
                if (self.low..=self.high).contains(&value) {
                    ticks.push(value);
                }
            }
        }
        ticks
    }
}

fn y(share: f64) -> f64 {
    TOP + (1.0 - share) * (HEIGHT - TOP - BOTTOM)
}

/// As short as can be: `0.5`, `20`, `1500`.
fn tick_name(value: f64) -> String {
    // Two digits tell all ticks apart, wherever the point is.
    let places = (1.0 - value.log10().floor()).clamp(0.0, 12.0) as usize;
    let text = format!("{value:.places$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// How many of the samples are at most so long, one line a system.
pub fn distribution(title: &str, unit: &str, lines: &[Line<'_>]) -> String {
    let Some(axis) = Axis::around(lines) else {
        return String::new();
    };
    let mut out = format!(
        "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
        escape(&format!("Distribution of {title} in {unit}"))
    );
    for (share, name) in [
        (0.0, "0"),
        (0.25, "25 %"),
        (0.5, "50 %"),
        (0.75, "75 %"),
        (0.9, "90 %"),
        (1.0, "100 %"),
    ] {
        let y = y(share);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 3.5
        );
    }
    let mut last_x = f64::NEG_INFINITY;
    for tick in axis.ticks() {
        let x = axis.x(tick);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{:.1}\"/>",
            y(0.0)
        );
        if x - last_x >= 34.0 {
            last_x = x;
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                y(0.0) + 15.0,
                tick_name(tick)
            );
        }
    }
    let _ = write!(
        out,
        "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{} (log scale)</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 8.0,
        escape(unit)
    );
    // Ours is drawn last, on top.
    for line in lines.iter().rev() {
        let n = line.sorted.len();
        let _ = write!(
            out,
            "<path class=\"line s{}\" d=\"{}\"><title>{}</title></path>",
            line.colour,
            steps(&axis, line.sorted),
            escape(&format!("{}: {n} samples", line.system))
        );
        if let Some(slowest) = line.sorted.last() {
            let _ = write!(
                out,
                "<circle class=\"dot s{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{}</title></circle>",
                line.colour,
                axis.x(*slowest),
                y(1.0),
                escape(&format!(
                    "{}: slowest {} {unit}",
                    line.system,
                    number(*slowest)
                ))
            );
        }
    }
    out.push_str("</svg>");
    out
}

/// The path of a step function.
fn steps(axis: &Axis, sorted: &[f64]) -> String {
    let n = sorted.len();
    let stride = n.div_ceil(POINTS).max(1);
    let mut path = String::new();
    for (index, value) in sorted.iter().enumerate() {
        let x = axis.x(*value);
        if index == 0 {
            let _ = write!(path, "M{x:.1} {:.1}", y(0.0));
        } else if index % stride != 0 && index + TAIL < n {
            continue;
        }
        let _ = write!(path, "H{x:.1}V{:.1}", y((index + 1) as f64 / n as f64));
    }
    path
}

/// A bar: its name, where it begins, how long it is, its colour and what is written behind it.
pub struct Bar {
    /// In front of it.
    pub name: String,
    /// Where it begins.
    pub from: f64,
    /// How long it is.
    pub length: f64,
    /// Number of its colour.
    pub colour: usize,
    /// Behind it.
    pub value: String,
}

/// Bars in rows on one scale that begins at 0; text beside them may wrap, so these are no SVG.
pub fn bars(bars: &[Bar]) -> String {
    let end = bars.iter().map(|bar| bar.from + bar.length);
    let end = end.fold(0.0, f64::max);
    if end <= 0.0 {
        return String::new();
    }
    let mut out = String::from("<div class=\"bars\">");
    for bar in bars {
        let _ = write!(
            out,
            "<span class=\"name\">{}</span><span class=\"track\"><i class=\"bar s{}\" \
             style=\"left:{:.2}%;width:{:.2}%\"></i></span><span class=\"value\">{}</span>",
            escape(&bar.name),
            bar.colour,
            bar.from / end * 100.0,
            bar.length / end * 100.0,
            escape(&bar.value)
        );
    }
    out.push_str("</div>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_have_short_names_that_differ() {
        assert_eq!(tick_name(1500.0), "1500");
        assert_eq!(tick_name(0.5), "0.5");
        assert_eq!(tick_name(20.0), "20");
        assert_eq!(tick_name(0.000_11), "0.00011");
    }

    #[test]
    fn a_narrow_distribution_does_not_fill_the_axis_and_nothing_has_no_picture() {
        let line = |sorted| Line {
            system: "ratoon",
            colour: 0,
            sorted,
        };
        let axis = Axis::around(&[line(&[10.0, 10.1])]).expect("values");
        assert!(axis.high / axis.low > 1.5);
        assert!(axis.x(10.1) - axis.x(10.0) < 20.0);
        assert!(!axis.ticks().is_empty());
        assert_eq!(distribution("x", "ms", &[line(&[])]), "");
        assert_eq!(distribution("x", "ms", &[line(&[0.0])]), "");
    }

    #[test]
    fn the_slowest_samples_are_all_in_the_line_however_many_there_are() {
        let sorted: Vec<f64> = (1..=10_000).map(f64::from).collect();
        let axis = Axis {
            low: 1.0,
            high: 10_000.0,
        };
        let path = steps(&axis, &sorted);
        let points = path.matches('H').count();
        assert!((POINTS..=POINTS + 2 * TAIL).contains(&points), "{points}");
        assert!(path.ends_with(&format!("V{:.1}", y(1.0))));
    }

    #[test]
    fn bars_are_on_one_scale() {
        let bar = |from, length| Bar {
            name: "a <b>".into(),
            from,
            length,
            colour: 0,
            value: String::new(),
        };
        let text = bars(&[bar(0.0, 1.0), bar(1.0, 3.0)]);
        assert!(text.contains("left:25.00%;width:75.00%"), "{text}");
        assert!(text.contains("a &lt;b&gt;"));
        assert_eq!(bars(&[]), "");
    }
}
