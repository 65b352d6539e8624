//! The page: one HTML file without anything from outside, for light and dark screens.
//!
//! Text from the samples' file is written as text, whatever it holds. It cannot fail.

use std::fmt::Write as _;

use super::plot::{self, Bar, Line};
use super::{command, facts, with_interval};
use crate::analysis::{Analysis, Figure, Group, NULL, OURS, Waterfall, is_headline};
use crate::stats::{PERCENTILES, number, percentile_name};

const STYLE: &str = include_str!("style.css");
/// Fewer samples of all systems together are no distribution.
const PLOTTED_FROM: usize = 5;
/// Colours that the style has.
const COLOURS: usize = 6;

/// Text as HTML has it.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// The systems of a run, each with the same colour all over the page; ours has the first.
struct Systems<'a>(Vec<&'a str>);

impl<'a> Systems<'a> {
    fn of(analysis: &'a Analysis) -> Self {
        let mut systems = vec![OURS];
        let groups = analysis.groups.iter();
        let groups = groups.filter(|group| group.what.scenario != NULL);
        for figure in groups.flat_map(|group| &group.figures) {
            if !systems.contains(&&*figure.system) {
                systems.push(&figure.system);
            }
        }
        Self(systems)
    }

    fn colour(&self, system: &str) -> usize {
        let place = self.0.iter().position(|known| *known == system);
        place.unwrap_or(0) % COLOURS
    }
}

/// The page of a run.
pub fn page(analysis: &Analysis) -> String {
    let systems = Systems::of(analysis);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>ratoon bench, {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>ratoon bench</h1>\n",
        escape(&analysis.host.date)
    );
    head(&mut out, analysis);
    gaps(&mut out, analysis);
    headline(&mut out, analysis, &systems);
    for scenario in analysis.scenario_names() {
        section(&mut out, analysis, &systems, scenario);
    }
    missing(&mut out, analysis);
    host(&mut out, analysis);
    method(&mut out, analysis);
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn head(out: &mut String, analysis: &Analysis) {
    let host = &analysis.host;
    let class = match &*host.class {
        "emulated" => ", guest kernels emulated",
        _ => "",
    };
    let quick = if analysis.quick { ", a quick run" } else { "" };
    let commit = match host.commit.as_str() {
        "" => String::new(),
        commit => format!(", commit <code>{}</code>", escape(commit)),
    };
    let _ = write!(
        out,
        "<p class=\"soft\">{}{commit}, {} x {}{class}{quick}</p>\n<nav><a href=\"#all\">All</a>",
        escape(&host.date),
        host.cpus,
        escape(&host.cpu),
    );
    for name in analysis.scenario_names() {
        let name = escape(name);
        let _ = write!(out, "<a href=\"#{name}\">{name}</a>");
    }
    out.push_str(
        "<a href=\"#missing\">what is missing</a><a href=\"#host\">the machine</a>\
         <a href=\"#method\">method</a></nav>\n",
    );
}

fn gaps(out: &mut String, analysis: &Analysis) {
    if analysis.gaps.is_empty() {
        out.push_str(
            "<p class=\"gaps none\">Complete; the machine was quiet before and after.</p>\n",
        );
        return;
    }
    out.push_str("<div class=\"gaps\"><strong>Before you believe a figure</strong><ul>");
    for gap in &analysis.gaps {
        let _ = write!(out, "<li>{}</li>", escape(gap));
    }
    out.push_str("</ul></div>\n");
}

fn key(systems: &Systems<'_>, system: &str) -> String {
    format!(
        "<span class=\"key s{}\"></span>{}",
        systems.colour(system),
        escape(system)
    )
}

/// All latencies up to a point of a start, medians and p99 only.
fn headline(out: &mut String, analysis: &Analysis, systems: &Systems<'_>) {
    let groups: Vec<&Group> = analysis
        .groups
        .iter()
        .filter(|it| is_headline(it))
        .collect();
    if groups.is_empty() {
        return;
    }
    out.push_str(
        "<h2 id=\"all\">Latencies at a glance</h2>\n<p class=\"soft\">How ready is “ready”: R0 \
         registers set, no guest instruction run; R1 the VM runs; R2 the control plane says so; R3 the \
         runtime in the guest has answered (R3' on the console); R4 a command's result is \
         back. Only R4 is what a user feels.</p>\n",
    );
    table(out, &groups, systems, true, &[500, 990]);
}

fn section(out: &mut String, analysis: &Analysis, systems: &Systems<'_>, scenario: &str) {
    let name = escape(scenario);
    let _ = writeln!(out, "<h2 id=\"{name}\">{name}</h2>");
    let groups: Vec<&Group> = analysis
        .groups
        .iter()
        .filter(|group| group.what.scenario == scenario)
        .collect();
    let plotted: Vec<&&Group> = groups
        .iter()
        .filter(|group| {
            let n: usize = group.figures.iter().map(|figure| figure.n).sum();
            group.what.is_time() && !group.what.is_phase() && n >= PLOTTED_FROM && scenario != NULL
        })
        .collect();
    if !plotted.is_empty() {
        out.push_str("<div class=\"plots\">");
        for group in plotted {
            distribution(out, group, systems);
        }
        out.push_str("</div>\n");
    }
    for waterfall in &analysis.waterfalls {
        if waterfall.scenario == scenario {
            phases(out, waterfall, systems);
        }
    }
    memory(out, &groups, systems);
    table(out, &groups, systems, false, &PERCENTILES);
}

fn distribution(out: &mut String, group: &Group, systems: &Systems<'_>) {
    let lines: Vec<Line<'_>> = group
        .figures
        .iter()
        .map(|figure| Line {
            system: &figure.system,
            colour: systems.colour(&figure.system),
            sorted: &figure.sorted,
        })
        .collect();
    let picture = plot::distribution(&group.title(), &group.what.unit, &lines);
    let _ = write!(
        out,
        "<figure><figcaption>{} <span>{}</span></figcaption>{picture}<div class=\"legend\">",
        escape(&group.title()),
        group.what.readiness.name()
    );
    for figure in &group.figures {
        let of_p = |per_mille| {
            let value = figure.percentile(per_mille).and_then(|it| it.value);
            value.map_or_else(String::new, |value| {
                format!(", {} {}", percentile_name(per_mille), number(value))
            })
        };
        let _ = write!(
            out,
            "<span>{}: n {}{}{}, max {}</span>",
            key(systems, &figure.system),
            figure.n,
            of_p(500),
            of_p(990),
            number(figure.max)
        );
    }
    out.push_str("</div></figure>\n");
}

fn phases(out: &mut String, waterfall: &Waterfall, systems: &Systems<'_>) {
    let mut from = 0.0;
    let colour = systems.colour(&waterfall.system);
    let mut bars = Vec::new();
    for (name, length) in &waterfall.phases {
        // A phase never ends before it begins; stamps of two threads may cross by a little.
        let length = length.max(0.0);
        bars.push(Bar {
            name: name.clone(),
            from,
            length,
            colour,
            value: format!("{} {}", number(length), waterfall.unit),
        });
        from += length;
    }
    let comma = if waterfall.case.is_empty() { "" } else { ", " };
    let _ = writeln!(
        out,
        "<figure><figcaption>A single start by its phases: {}{comma}{} <span>round {}, the one whose \
         total ({} {}) is the median</span></figcaption>{}</figure>",
        key(systems, &waterfall.system),
        escape(&waterfall.case),
        waterfall.round,
        number(from),
        escape(&waterfall.unit),
        plot::bars(&bars)
    );
}

fn memory(out: &mut String, groups: &[&Group], systems: &Systems<'_>) {
    let mut bars = Vec::new();
    for group in groups
        .iter()
        .filter(|it| matches!(&*it.what.unit, "KiB" | "MiB"))
    {
        for figure in &group.figures {
            let value = figure.p50().unwrap_or(figure.max);
            let kib = if group.what.unit == "MiB" {
                value * 1024.0
            } else {
                value
            };
            let system = match figure.system.as_str() {
                OURS => String::new(),
                other => format!(" ({other})"),
            };
            bars.push(Bar {
                name: format!("{}{system}", group.title()),
                from: 0.0,
                length: kib,
                colour: systems.colour(&figure.system),
                value: format!("{} {}", number(value), group.what.unit),
            });
        }
    }
    if !bars.is_empty() {
        let _ = writeln!(
            out,
            "<figure><figcaption>Memory <span>medians</span></figcaption>{}</figure>",
            plot::bars(&bars)
        );
    }
}

/// Percentiles; with or without the scenario's name in front.
fn table(
    out: &mut String,
    groups: &[&Group],
    systems: &Systems<'_>,
    with_scenario: bool,
    percentiles: &[u32],
) {
    let beside = groups.iter().any(|group| group.figures.len() > 1);
    if !with_scenario {
        out.push_str("<h3>Percentiles</h3>\n");
    }
    out.push_str("<div class=\"scroll\"><table><thead><tr>");
    if with_scenario {
        out.push_str("<th>scenario</th>");
    }
    out.push_str("<th>what</th><th>up to</th><th>system</th><th>unit</th><th class=\"n\">n</th>");
    for per_mille in percentiles {
        let _ = write!(out, "<th class=\"n\">{}</th>", percentile_name(*per_mille));
    }
    out.push_str("<th class=\"n\">max</th>");
    if beside {
        out.push_str("<th class=\"n\">times ours</th>");
    }
    out.push_str("</tr></thead><tbody>\n");
    for group in groups {
        for (index, figure) in group.figures.iter().enumerate() {
            let more = if index + 1 < group.figures.len() {
                " class=\"more\""
            } else {
                ""
            };
            let _ = write!(out, "<tr{more}>");
            let first = |text: String| if index == 0 { text } else { String::new() };
            if with_scenario {
                let _ = write!(out, "<td>{}</td>", first(escape(&group.what.scenario)));
            }
            let _ = write!(
                out,
                "<td class=\"what\">{}</td><td>{}</td><td class=\"system\">{}</td><td>{}</td><td class=\"n\">{}</td>",
                first(escape(&group.title())),
                first(group.what.readiness.name().to_owned()),
                key(systems, &figure.system),
                first(escape(&group.what.unit)),
                figure.n
            );
            for per_mille in percentiles {
                percentile_cell(out, figure, *per_mille);
            }
            let _ = write!(out, "<td class=\"n\">{}</td>", number(figure.max));
            if beside {
                let _ = match figure.ratio_to_ours {
                    None => write!(out, "<td class=\"n\"></td>"),
                    Some((ratio, interval)) => write!(
                        out,
                        "<td class=\"n\">{ratio:.2}<small>{:.2} to {:.2}</small></td>",
                        interval.low, interval.high
                    ),
                };
            }
            out.push_str("</tr>\n");
        }
    }
    out.push_str("</tbody></table></div>\n");
}

fn percentile_cell(out: &mut String, figure: &Figure, per_mille: u32) {
    let percentile = figure.percentile(per_mille);
    let value = percentile.and_then(|it| it.value);
    let (text, interval) = with_interval(value, percentile.and_then(|it| it.interval));
    let _ = match (value, interval) {
        (None, _) => write!(out, "<td class=\"n na\">n/a</td>"),
        (_, None) => write!(out, "<td class=\"n\">{text}</td>"),
        (_, Some(interval)) => {
            let interval = interval.replace(" or more", "+");
            write!(out, "<td class=\"n\">{text}<small>{interval}</small></td>")
        }
    };
}

fn missing(out: &mut String, analysis: &Analysis) {
    out.push_str("<h2 id=\"missing\">What is missing, and verdicts</h2>\n<ul>");
    for it in &analysis.missing {
        let _ = write!(
            out,
            "<li>n/a: {}, {}: {}</li>",
            escape(&it.scenario),
            escape(&it.system),
            escape(&it.why)
        );
    }
    if analysis.missing.is_empty() {
        out.push_str("<li>No figure was given up.</li>");
    }
    for note in &analysis.notes {
        let _ = write!(out, "<li>{}</li>", escape(note));
    }
    out.push_str("</ul>\n");
}

fn host(out: &mut String, analysis: &Analysis) {
    out.push_str("<h2 id=\"host\">The machine, and how to repeat this</h2>\n<dl>");
    for (name, value) in facts(analysis) {
        let _ = write!(out, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
    }
    let _ = write!(
        out,
        "</dl>\n<pre><code>{}</code></pre>\n",
        escape(&command(analysis))
    );
    out.push_str("<dl>");
    for went in &analysis.scenarios {
        let _ = write!(
            out,
            "<dt>{}</dt><dd>{:.1} s</dd>",
            escape(&went.name),
            went.seconds
        );
    }
    out.push_str("</dl>\n");
}

fn method(out: &mut String, analysis: &Analysis) {
    out.push_str(
        "<h2 id=\"method\">Method</h2>\n<p>Every sample is in <code>samples.jsonl</code>; nothing is \
         trimmed. Percentiles are nearest rank and printed only when at least one sample lies beyond: \
         p50 from 2 samples, p90 from 10, p95 from 20, p99 from 100, p99.9 from 1000. In small print \
         below each: the 95 % bootstrap interval (2000 resamples, seeded; from 5 samples on). A “+”: the interval ends at the slowest sample, so the samples set no bound. “Times ours”: \
         ratio of medians with its interval. Systems of one run take turns, so that what disturbs one \
         disturbs all.</p>\n<p>Latencies are differences of CLOCK_MONOTONIC. Where a first round \
         only warms the page cache it is not counted, and docs/benchmarks.md says so of its scenario. Under \
         sustained load a latency counts from when the request was <em>meant</em> to begin, so that \
         a stall delays all who came meanwhile.</p>\n",
    );
    if let Some(overhead) = &analysis.overhead {
        let _ = writeln!(
            out,
            "<p>The harness's own share, shown by the scenario <code>{NULL}</code>: {} ns, {:.4} % of the \
             shortest latency reported ({}, {} ms).</p>",
            number(overhead.null_p50_ms * 1e6),
            overhead.share * 100.0,
            escape(&overhead.shortest.0),
            number(overhead.shortest.1)
        );
    }
}
