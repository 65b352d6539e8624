//! Against the host's python3, node and bash.

mod host;

use super::*;
use host::Host;
use ratoon_protocol::CodeStatus;
use serde_json::Value;

const ALL: [Language; 3] = [Language::Python, Language::Node, Language::Bash];

#[test]
fn what_a_cell_leaves_is_there_for_the_next_one() {
    let mut host = Host::new();
    for language in ALL {
        host.context(language, "a");
        let (first, second) = match language {
            Language::Python => (
                "import math\ndef f(x): return x + math.floor(1.5)\ny = 4",
                "print(f(y))",
            ),
            Language::Node => ("const f = (x) => x + 1; let y = 4;", "console.log(f(y))"),
            Language::Bash => (
                "cd /; declare -A y=([k]=5); f() { echo ${y[k]}; }",
                "[ $PWD = / ] && f",
            ),
        };
        let ran = host.run("a", first);
        assert_eq!((ran.end.status, ran.end.count), (CodeStatus::Ok, 1));
        let ran = host.run("a", second);
        assert_eq!(
            (ran.stdout.as_str(), ran.end.count),
            ("5\n", 2),
            "{language:?}"
        );
        assert_eq!(ran.end.error, None);
        host.contexts.remove("a").unwrap();
    }
}

#[test]
fn the_last_expression_is_the_value_and_other_statements_have_none() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    assert_eq!(host.run("p", "x = 6\nx * 7").value(), Some("42"));
    assert_eq!(host.run("p", "_ + 1").value(), Some("43"));
    for nothing in ["y = 1", "None", "6 * 7;", "", "# a comment"] {
        assert_eq!(host.run("p", nothing).data, [], "{nothing}");
    }
    let code = "import asyncio\nawait asyncio.sleep(0, 'waited')";
    assert_eq!(host.run("p", code).value(), Some("'waited'"));
    host.context(Language::Node, "n");
    let ran = host.run("n", "await Promise.resolve({ a: [1] })");
    assert_eq!(ran.value(), Some("{ a: [ 1 ] }"));
    assert_eq!(
        ran.data[0].data["application/json"],
        serde_json::json!({"a": [1]})
    );
    assert_eq!(host.run("n", "var z = 1").data, []);
    assert_eq!(
        host.run("n", "require('path').basename('/a/b')").value(),
        Some("'b'")
    );
}

#[test]
fn a_value_is_shown_in_all_forms_that_it_has() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    let code = r#"
class Rich:
    def __repr__(self): return "rich"
    def _repr_html_(self): return "<b>é</b>"
    def _repr_png_(self): return b"\x89PNG"
    def _repr_json_(self): return {"a": [1]}
    def _repr_svg_(self): return None
    def _repr_latex_(self): raise ValueError("no latex")
display(Rich())
Rich()
"#;
    let ran = host.run("p", code);
    assert_eq!(ran.end.status, CodeStatus::Ok);
    let results: Vec<bool> = ran.data.iter().map(|data| data.result).collect();
    assert_eq!(results, [false, true]);
    let expected = serde_json::json!({
        "text/plain": "rich",
        "text/html": "<b>é</b>",
        "image/png": "iVBORw==",
        "application/json": {"a": [1]},
    });
    for data in &ran.data {
        assert_eq!(serde_json::to_value(&data.data).unwrap(), expected);
    }
    assert!(ran.stderr.contains("no latex"), "{}", ran.stderr);
}

#[test]
fn an_error_shows_the_cells_lines_and_no_others() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    host.run("p", "def f():\n    return 1 / 0");
    let ran = host.run("p", "x = 1\nf()");
    assert_eq!(ran.end.status, CodeStatus::Error);
    let error = ran.error();
    assert_eq!(error.name, "ZeroDivisionError");
    assert_eq!(error.message, "division by zero");
    for line in [
        "<cell 2>\", line 2",
        "    f()",
        "<cell 1>\", line 2",
        "return 1 / 0",
    ] {
        assert!(error.traceback.contains(line), "{}", error.traceback);
    }
    assert!(!error.traceback.contains("<string>"), "{}", error.traceback);
    let ran = host.run("p", "x = = 1");
    assert_eq!(ran.error().name, "SyntaxError");
    assert!(!ran.error().traceback.contains("<string>"));
    assert_eq!(host.run("p", "input()").error().name, "EOFError");

    host.context(Language::Node, "n");
    let ran = host.run("n", "function f() { throw new TypeError('bad') }\nf()");
    assert_eq!(
        (ran.error().name.as_str(), ran.error().message.as_str()),
        ("TypeError", "bad")
    );
    assert!(
        ran.error().traceback.contains("cell-1:1"),
        "{}",
        ran.error().traceback
    );
    assert_eq!(host.run("n", "let = ;").error().name, "SyntaxError");

    host.context(Language::Bash, "b");
    let ran = host.run("b", "(exit 3)");
    assert_eq!(
        (ran.error().name.as_str(), ran.error().message.as_str()),
        ("ExitStatus", "3")
    );
    assert_eq!(host.run("b", "echo $?").stdout, "3\n");
}

#[test]
fn an_interrupt_ends_the_cell_and_keeps_the_state() {
    let mut host = Host::new();
    for (language, cells) in [
        (
            Language::Python,
            &[
                "x = 5\nimport sys\nprint('go', flush=True)\nwhile True: pass",
                "import time\nprint('go', flush=True)\ntime.sleep(100)",
                // The shell says it: until there is one, system(3) has nobody heed an interrupt.
                "import os\nos.system('echo go; sleep 100; sleep 100') and 1 / 0\ntime.sleep(100)",
                "import asyncio\nprint('go', flush=True)\nawait asyncio.sleep(100)",
            ][..],
        ),
        (
            Language::Node,
            &[
                "var x = 5; console.log('go'); while (true);",
                "console.log('go'); await new Promise((r) => setTimeout(r, 100000))",
            ][..],
        ),
        (
            Language::Bash,
            &[
                "x=5; f() { echo go; sleep 100; echo no; }; while true; do f; done; echo no",
                "echo go; while :; do :; done",
                "echo go; sleep 100 | cat; echo no",
            ][..],
        ),
    ] {
        host.context(language, "c");
        for cell in cells {
            let at = host.begin("c", cell);
            host.interrupt_when_it_prints("c", at);
            let ran = host.end(at);
            assert_eq!(
                ran.end.status,
                CodeStatus::Interrupted,
                "{cell}: {:?}",
                ran.end
            );
            assert_eq!(ran.stdout, "go\n", "{cell}");
        }
        let (code, expected) = match language {
            Language::Bash => ("echo $x; echo second", "5\nsecond\n"),
            Language::Python => ("print(x)", "5\n"),
            Language::Node => ("console.log(x)", "5\n"),
        };
        let ran = host.run("c", code);
        assert_eq!(
            (ran.stdout.as_str(), ran.end.status),
            (expected, CodeStatus::Ok),
            "{code}: {:?}",
            ran.end
        );
        host.contexts.remove("c").unwrap();
    }
}

#[test]
fn an_interrupt_without_a_cell_harms_nothing() {
    let mut host = Host::new();
    for language in ALL {
        host.context(language, "c");
        let at = host.at();
        let params = CodeName {
            context: "c".into(),
        };
        host.contexts
            .interrupt(at, &params, &mut host.fake)
            .unwrap();
        // One that came too late for its cell.
        host.contexts.named("c").unwrap().signal(Signal::INT);
        let code = match language {
            Language::Python => "print(1)",
            Language::Node => "console.log(1)",
            Language::Bash => "echo 1",
        };
        let ran = host.run("c", code);
        assert_eq!(
            (ran.stdout.as_str(), ran.end.status),
            ("1\n", CodeStatus::Ok)
        );
        host.contexts.remove("c").unwrap();
    }
}

#[test]
fn a_cell_that_takes_too_long_is_interrupted_and_one_that_does_not_heed_it_killed() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    let ran = host.run_for("p", "x = 1\nimport time\ntime.sleep(100)", 200);
    assert_eq!(ran.end.status, CodeStatus::Timeout);
    assert_eq!(ran.error().name, "KeyboardInterrupt");
    assert_eq!(host.run("p", "x").value(), Some("1"));
    let deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass";
    let ran = host.run_for("p", deaf, 200);
    assert_eq!(
        (ran.end.status, ran.error().name.as_str()),
        (CodeStatus::Died, "Timeout")
    );
    let error = host.send(CodeRun {
        context: Some("p".into()),
        ..CodeRun::default()
    });
    assert_eq!(error.unwrap_err().code, ErrorCode::NotFound);
}

#[test]
fn a_restart_forgets_and_a_stop_frees_the_name() {
    let mut host = Host::new();
    for language in ALL {
        let old = host.context(language, "c");
        let (set, get) = match language {
            Language::Python => ("x = 1", "print('x' in globals())"),
            Language::Node => ("x = 1", "console.log('x' in globalThis)"),
            Language::Bash => ("x=1", "[ -n \"$x\" ] && echo true || echo false"),
        };
        host.run("c", set);
        let at = host.at();
        let params = CodeName {
            context: "c".into(),
        };
        let Host {
            contexts,
            spawner,
            fake,
            ..
        } = &mut host;
        contexts.restart(at, &params, spawner, fake).unwrap();
        let new: CodeContext = serde_json::from_value(host.answer(at).unwrap()).unwrap();
        assert_ne!(old.pid, new.pid);
        assert_eq!((new.count, new.context.as_str()), (0, "c"));
        assert_eq!(host.run("c", get).stdout.to_lowercase(), "false\n");
        let at = host.at();
        host.contexts.stop(at, &params, &mut host.fake).unwrap();
        assert_eq!(host.answer(at), Ok(Value::Null));
        assert_eq!(host.contexts.list(), []);
    }
    host.wait_until(|host| host.contexts.contexts.is_empty());
}

#[test]
fn the_second_context_costs_no_interpreter_and_shares_nothing() {
    let mut host = Host::new();
    host.context(Language::Python, "a");
    host.context(Language::Python, "b");
    assert_eq!(host.contexts.zygotes.len(), 1);
    let zygote = host.contexts.zygotes.values().next().unwrap().pid;
    let parents = ["a", "b"].map(|name| host.run(name, "import os; os.getppid()"));
    for ran in &parents {
        assert_eq!(ran.value(), Some(zygote.to_string().as_str()));
    }
    host.run("a", "x = 1");
    assert_eq!(host.run("b", "x").error().name, "NameError");
    let random = "import random; random.random()";
    let (a, b) = (host.run("a", random), host.run("b", random));
    assert_ne!(a.value(), b.value());
}

/// What a sibling would see too, if it were not for the reseeding: a program is a twin of itself when
/// it begins with the same seed.
#[test]
fn after_a_wake_generators_that_were_seeded_give_other_numbers() {
    // Its own state is the one thing of a generator that a test can put back.
    let python = "random.seed(5); ssl.RAND_bytes(1)";
    let mut host = Host::new();
    host.context(Language::Python, "p");
    host.run("p", "import random, ssl, time");
    let mut drawn = Vec::new();
    for wakes in [false, true, true] {
        host.run("p", python);
        if wakes {
            host.contexts.reseed();
        }
        drawn.push(host.run("p", "random.random()").value().map(str::to_owned));
    }
    assert_eq!(drawn[0].as_deref(), Some("0.6229016948897019"));
    assert!(
        drawn[1] != drawn[0] && drawn[2] != drawn[0] && drawn[1] != drawn[2],
        "{drawn:?}"
    );

    host.context(Language::Bash, "b");
    let mut drawn = Vec::new();
    for wakes in [false, true, true] {
        host.run("b", "RANDOM=5");
        if wakes {
            host.contexts.reseed();
        }
        drawn.push(host.run("b", "echo $RANDOM $RANDOM $RANDOM").stdout);
    }
    assert!(
        drawn[1] != drawn[0] && drawn[2] != drawn[0] && drawn[1] != drawn[2],
        "{drawn:?}"
    );
    assert_eq!(host.run("b", "(exit 3)").end.status, CodeStatus::Error);
}

#[test]
fn a_cell_that_runs_has_other_random_numbers_from_the_wake_on() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    let cell = "import random, time\nrandom.seed(5)\nbefore = random.getstate()\nprint('go', flush=True)\n\
                for _ in range(1000):\n    if random.getstate() != before: break\n    time.sleep(0.01)\n\
                random.getstate() != before";
    let at = host.begin("p", cell);
    host.wait_until(|host| {
        host.fake
            .outputs
            .get(&at.call)
            .is_some_and(|all| !all[0].is_empty())
    });
    host.contexts.reseed();
    assert_eq!(host.end(at).value(), Some("True"));
}

#[test]
fn after_a_wake_node_has_the_kernels_random_numbers() {
    let mut host = Host::new();
    host.context(Language::Node, "n");
    let native = "const crypto = require('crypto'); \
                  [Math.random, crypto.randomBytes, crypto.randomUUID].map((f) => /native|internal|entropy/.test(String(f)))";
    host.run("n", native);
    host.contexts.reseed();
    // Each gives what node's own would, and never the same twice.
    let all = "\
        const a = new Set(Array.from({ length: 1000 }, () => Math.random())); \
        const inRange = [...a].every((x) => x >= 0 && x < 1); \
        const ints = Array.from({ length: 1000 }, () => crypto.randomInt(-3, 4)); \
        const filled = crypto.randomFillSync(new Uint16Array(64), 32, 16); \
        const uuid = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/; \
        const later = await new Promise((done) => crypto.randomBytes(16, (error, bytes) => done(bytes))); \
        const refused = [() => crypto.randomBytes(-1), () => crypto.randomInt(3, 3), () => crypto.randomFillSync(1)] \
          .every((f) => { try { f(); return false; } catch (error) { return error.code.startsWith('ERR_'); } }); \
        [a.size, inRange, Math.min(...ints), Math.max(...ints), uuid.test(crypto.randomUUID()), \
         crypto.randomUUID() !== crypto.randomUUID(), crypto.randomBytes(40).length, later.length, \
         filled.slice(0, 32).every((x) => x === 0), filled.slice(32, 48).some((x) => x !== 0), \
         filled.slice(48).every((x) => x === 0), \
         globalThis.crypto.getRandomValues(new Uint8Array(32)).some((x) => x !== 0), refused].join()";
    let ran = host.run("n", all);
    let expected = "'1000,true,-3,3,true,true,40,16,true,true,true,true,true'";
    assert_eq!(ran.value(), Some(expected), "{:?}", ran.end);
    let name = host.run("n", "Math.random.name + Math.random.length");
    assert_eq!(name.value(), Some("'random0'"));
}

#[test]
fn one_cell_at_a_time_runs_in_a_context_and_others_go_on() {
    let mut host = Host::new();
    host.context(Language::Python, "a");
    host.context(Language::Python, "b");
    let at = host.begin("a", "print('go', flush=True)\nimport time\ntime.sleep(100)");
    let error = host.send(CodeRun {
        context: Some("a".into()),
        ..CodeRun::default()
    });
    assert_eq!(error.unwrap_err().code, ErrorCode::Busy);
    assert_eq!(host.run("b", "1").value(), Some("1"));
    let busy: Vec<bool> = host.contexts.list().iter().map(|info| info.busy).collect();
    assert_eq!(busy, [true, false]);
    host.interrupt_when_it_prints("a", at);
    assert_eq!(host.end(at).end.status, CodeStatus::Interrupted);
}

#[test]
fn much_output_comes_whole_and_in_order_and_before_the_reply() {
    let mut host = Host::new();
    for language in ALL {
        host.context(language, "c");
        let code = match language {
            Language::Python => "for i in range(1000000): print('%09d' % i)",
            Language::Node => {
                "for (let i = 0; i < 1000000; i += 1000) console.log(Array.from({length: 1000}, (_, k) => String(i + k).padStart(9, '0')).join('\\n'))"
            }
            Language::Bash => "seq -f %09.0f 0 999999",
        };
        let ran = host.run("c", code);
        assert_eq!(ran.end.status, CodeStatus::Ok, "{:?}", ran.end);
        assert_eq!(ran.stdout.len(), 10_000_000, "{language:?}");
        let in_order = ran.stdout.lines().enumerate();
        assert!(
            in_order
                .into_iter()
                .all(|(at, line)| line.parse() == Ok(at))
        );
        host.contexts.remove("c").unwrap();
    }
}

#[test]
fn a_large_value_is_passed_on_in_pieces() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    let code = "class Big:\n  def _repr_html_(self): return 'x' * 5000000\nBig()";
    let ran = host.run("p", code);
    assert_eq!(
        ran.data[0].data["text/html"].as_str().unwrap().len(),
        5_000_000
    );
    let code = "class Huge:\n  def _repr_html_(self): return 'x' * 9000000\nHuge()";
    let ran = host.run("p", code);
    assert!(!ran.data[0].data.contains_key("text/html"));
    assert!(ran.stderr.contains("too large"), "{}", ran.stderr);
}

#[test]
fn output_of_children_stands_where_it_belongs() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    let code = "import subprocess, os\nprint(1)\nsubprocess.run(['echo', '2'])\nprint(3)\nos.system('echo 4')\nprint(5)\nos.fork() or print(6, flush=True) or os._exit(0)\nos.wait()\nprint(7)";
    let ran = host.run("p", code);
    assert_eq!(ran.stdout, "1\n2\n3\n4\n5\n6\n7\n", "{:?}", ran.end);
    // A child that runs on to the cell's end does not answer for it.
    let ran = host.run("p", "pid = os.fork()\nif pid: os.waitpid(pid, 0)\n'once'");
    assert_eq!(ran.data.len(), 1);
    assert_eq!(host.run("p", "1").value(), Some("1"));
}

#[test]
fn a_long_cell_shows_its_output_as_it_comes() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    let at = host.begin("p", "import time\nprint('early')\ntime.sleep(100)");
    host.interrupt_when_it_prints("p", at);
    assert_eq!(host.end(at).stdout, "early\n");
}

#[test]
fn the_end_of_an_interpreter_ends_its_cell_and_context() {
    let mut host = Host::new();
    for (language, code, message) in [
        (
            Language::Python,
            "import os\nprint('x', flush=True)\nos._exit(3)",
            "the interpreter exited with status 3",
        ),
        (
            Language::Python,
            "print('x')\nexit(4)",
            "the interpreter exited with status 4",
        ),
        (
            Language::Python,
            "import ctypes\nprint('x', flush=True)\nctypes.string_at(0)",
            "the interpreter was killed by signal 11",
        ),
        (
            Language::Python,
            "import os\nprint('x', flush=True)\nos.kill(os.getpid(), 9)",
            "the interpreter was killed by signal 9",
        ),
        (
            Language::Node,
            "console.log('x'); process.exit(3)",
            "the interpreter exited with status 3",
        ),
        (
            Language::Bash,
            "echo x; exit 3",
            "the interpreter exited with status 3",
        ),
        (
            Language::Bash,
            "echo x; kill -9 $$",
            "the interpreter was killed by signal 9",
        ),
    ] {
        host.context(language, "c");
        let ran = host.run("c", code);
        assert_eq!(ran.end.status, CodeStatus::Died, "{code}");
        assert_eq!(ran.error().message, message, "{code}");
        assert_eq!(ran.stdout, "x\n", "{code}");
        assert_eq!(host.contexts.list(), [], "{code}");
    }
    // The zygote has survived all of it.
    assert_eq!(host.contexts.zygotes.len(), 1);
}

#[test]
fn garbage_on_the_control_channel_ends_the_context_and_nothing_else() {
    let mut host = Host::new();
    for garbage in [
        "b'hello\\n'",
        "b'E[]\\n'",
        "b'E{\"status\":\"ok\"}\\n' * 2",
        "b'E' + b' ' * 400000",
        "b'\\xff' * 100",
    ] {
        host.context(Language::Python, "p");
        host.run("p", "1");
        let code = format!("import os, time\nos.write(3, {garbage})\ntime.sleep(100)");
        let at = host.begin("p", &code);
        let _ = host.answer(at).unwrap();
        host.wait_until(|host| host.contexts.contexts.is_empty());
    }
    host.context(Language::Python, "p");
    assert_eq!(host.run("p", "1").value(), Some("1"));
}

#[test]
fn a_client_that_goes_away_leaves_the_context_to_others() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    let at = host.begin(
        "p",
        "x = 1\nprint('go', flush=True)\nwhile True: print('y' * 1000)",
    );
    host.wait_until(|host| host.fake.outputs.contains_key(&at.call));
    host.contexts.lost(1);
    host.wait_until(|host| !host.contexts.list()[0].busy);
    assert!(!host.fake.results.contains_key(&at.call));
    let ran = host.run("p", "x");
    assert_eq!((ran.value(), ran.stdout.as_str()), (Some("1"), ""));
}

#[test]
fn what_a_thread_prints_between_cells_is_the_next_ones() {
    let mut host = Host::new();
    host.context(Language::Python, "p");
    let code =
        "import threading, os\nthreading.Timer(0.05, lambda: os.write(1, b'late\\n')).start()";
    assert_eq!(host.run("p", code).stdout, "");
    host.wait_until(|host| {
        let mut all = host.contexts.contexts.values();
        all.any(|context| context.has_late_output())
    });
    assert_eq!(host.run("p", "print('own')").stdout, "late\nown\n");
}

#[test]
fn what_cannot_be_is_refused_by_its_code() {
    let mut host = Host::new();
    let nowhere = |language| CodeStart {
        language,
        cwd: Some("/no/such".into()),
        ..CodeStart::default()
    };
    for language in ALL {
        let error = host.start(nowhere(language)).unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");
        let empty = CodeStart {
            language,
            env: vec![("PATH".into(), "/no/such".into())],
            ..CodeStart::default()
        };
        let error = host.start(empty).unwrap_err();
        assert_eq!(error.code, ErrorCode::Unsupported);
        let expected = format!("no {} in this image", word(language));
        assert!(error.message.starts_with(&expected), "{error}");
    }
    host.context(Language::Bash, "b");
    let named = |name: &str| CodeStart {
        language: Language::Bash,
        context: Some(name.into()),
        ..CodeStart::default()
    };
    assert_eq!(host.start(named("b")).unwrap_err().code, ErrorCode::Exists);
    assert_eq!(
        host.start(named("")).unwrap_err().code,
        ErrorCode::BadRequest
    );
    let run = |context: &str, code: String| CodeRun {
        context: Some(context.into()),
        code,
        ..CodeRun::default()
    };
    let long = "x".repeat(MAX_CODE_LEN);
    for (params, code) in [
        (run("none", String::new()), ErrorCode::NotFound),
        (run("b", long), ErrorCode::BadRequest),
        (run("b", "\0".into()), ErrorCode::BadRequest),
    ] {
        assert_eq!(host.send(params).unwrap_err().code, code);
    }
}

#[test]
fn a_zygote_that_is_killed_is_replaced_and_its_contexts_live_on() {
    let mut host = Host::new();
    host.context(Language::Python, "a");
    host.run(
        "a",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    );
    host.wait_until(|host| host.contexts.zygotes.is_empty());
    assert_eq!(host.run("a", "1").value(), Some("1"));
    host.context(Language::Python, "b");
    assert_eq!(host.run("b", "2").value(), Some("2"));
    let ran = host.run("a", "os._exit(0)");
    assert_eq!(ran.end.status, CodeStatus::Died);
}

#[test]
fn a_run_without_a_context_starts_the_default_one_and_uses_it_again() {
    let mut host = Host::new();
    for count in [1, 2] {
        let params = CodeRun {
            code: "x=$((x + 1)); echo $x".into(),
            language: Language::Bash,
            ..CodeRun::default()
        };
        let at = host.send(params).unwrap();
        let ran = host.end(at);
        assert_eq!(
            (ran.end.context.as_str(), ran.end.count),
            ("default-bash", count)
        );
        assert_eq!(ran.stdout, format!("{count}\n"));
    }
}
