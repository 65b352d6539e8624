//! Start and end with a stand-in for the VMM: this test binary, started again through a shell
//! script, doing what `RATOON_TEST_VMM`'s word says. A real guest is tested in `tests/`.

use std::error::Error;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use ratoon_vmm_api::Inherited;

use super::*;
use crate::vm::life::{self, LifeError, Status, Stopped};

struct Bench {
    temp: tempfile::TempDir,
    store: Store,
    launch: Launch,
}

/// A launch of a VMM that behaves as `mode` says.
fn bench(mode: &str) -> Bench {
    let temp = tempfile::tempdir().unwrap();
    let vmm = temp.path().join("vmm");
    let test = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\nRATOON_TEST_VMM='{mode}' RATOON_TEST_ARGS=\"$*\" exec {} --exact \
         vm::launch::tests::stand_in_for_the_vmm --nocapture\n",
        test.display()
    );
    std::fs::write(&vmm, script).unwrap();
    std::fs::set_permissions(&vmm, std::fs::Permissions::from_mode(0o700)).unwrap();
    let file = |name: &str| {
        let path = temp.path().join(name);
        std::fs::write(&path, "x").unwrap();
        path
    };
    let machine = Machine {
        cpus: 1,
        memory_mib: 128,
        kernel: file("kernel"),
        kernel_args: String::new(),
        initramfs: file("initramfs"),
        root_disk: file("disk"),
        networks: Vec::new(),
    };
    Bench {
        store: Store::new(temp.path().join("vms")),
        launch: Launch {
            vmm,
            name: Some("x".into()),
            image: None,
            detached: false,
            boot_timeout: Duration::from_secs(60),
            keep_open: Arc::new([]),
            machine,
            runtime: None,
            generation: None,
            pager: None,
            parent: None,
            labels: BTreeMap::new(),
            shells: None,
            family: None,
        },
        temp,
    }
}

impl Bench {
    fn start(&self) -> Result<Vm, LaunchError> {
        launch(&self.store, &self.launch, None)
    }

    fn nothing_is_left(&self) {
        let left: Vec<_> = std::fs::read_dir(self.store.root())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, [".lock"]);
    }
}

fn inherited_config() -> (VmConfig, std::fs::File) {
    assert_eq!(std::env::var("RATOON_TEST_ARGS").unwrap(), "--owned");
    let mut inherited = Inherited::take().unwrap();
    let mut json = Vec::new();
    inherited.config.read_to_end(&mut json).unwrap();
    // Nobody serves the control socket: connecting to it fails.
    drop(inherited.control);
    let config = VmConfig::from_json(&json).unwrap();
    (config, inherited.lifeline.into())
}

/// Run by `bench`'s script; in an ordinary test run it does nothing.
#[test]
fn stand_in_for_the_vmm() {
    let Ok(mode) = std::env::var("RATOON_TEST_VMM") else {
        return;
    };
    let (config, mut lifeline) = inherited_config();
    let report = |outcome: &str| {
        let json = format!(r#"{{"id":"{}","outcome":{outcome}}}"#, config.id);
        std::fs::write(config.exit_report.as_ref().unwrap(), json).unwrap();
    };
    let serial = |text: &str| {
        std::fs::write(&config.serial.as_ref().unwrap().log, text).unwrap();
    };
    let connect = || {
        let mut path = config
            .vsock
            .as_ref()
            .unwrap()
            .socket
            .clone()
            .into_os_string();
        path.push("_1024");
        UnixStream::connect(path).unwrap()
    };
    match mode.as_str() {
        "ready" => {
            // A guest that connects and says nothing comes first: it is not the runtime.
            drop(connect());
            let mut stream = connect();
            stream.write_all(b"hello").unwrap();
            if lifeline.read(&mut [0]).unwrap() == 0 {
                std::fs::remove_dir_all(config.remove_when_orphaned.unwrap()).unwrap();
            } else {
                // The guest of a detached VM hangs until it is killed.
                std::thread::sleep(Duration::from_secs(600));
            }
        }
        "joined" => {
            // As a VMM does with the connection that went on; the runtime waits for its wake.
            let mut stream = connect();
            let mut frame = [0; 4096];
            let len = stream.read(&mut frame).unwrap();
            assert!(frame[24..len].starts_with(br#"{"method":"wake""#));
            let awake = br#"{"generation":"g","id":"i","index":0,"wakes":1}"#;
            let reply =
                ratoon_protocol::Frame::new(ratoon_protocol::Kind::Reply, 1, awake.to_vec());
            stream.write_all(&reply.encode()).unwrap();
            let _ = lifeline.read(&mut [0]);
            std::fs::remove_dir_all(config.remove_when_orphaned.unwrap()).unwrap();
        }
        "panics" => {
            serial("Linux version 6\nKernel panic - not syncing: no init\n");
            report(r#"{"kind":"panicked"}"#);
        }
        "fails" => {
            report(r#"{"kind":"failed","causes":["opening /dev/kvm","permission denied"]}"#);
        }
        "silent" => std::thread::sleep(Duration::from_secs(600)),
        other => panic!("no mode {other}"),
    }
    std::process::exit(0);
}

#[test]
fn a_vm_is_ready_when_its_runtime_has_said_something_and_ends_without_a_trace() {
    let bench = bench("ready");
    let mut vm = bench.start().unwrap();
    let mut hello = [0; 5];
    let mut runtime = vm.take_runtime().unwrap();
    runtime.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    assert!(vm.take_runtime().is_none());
    assert!(!vm.dir().ready_socket().exists());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(vm.dir().path()), 0o700);
    let entry = bench.store.find("x").unwrap();
    let info = life::info(&entry);
    assert_eq!((info.status, info.pid.is_some()), (Status::Running, true));
    assert!(matches!(
        life::remove(&bench.store, &entry, false),
        Err(LifeError::Live {
            status: Status::Running,
            ..
        })
    ));
    let process = entry.record.unwrap().vmm.unwrap();
    vm.end().unwrap();
    assert!(!process.is_alive());
    bench.nothing_is_left();
}

#[test]
fn a_frozen_machine_is_woken_by_the_first_call_on_its_connection_and_is_ready_then() {
    use crate::vm::freeze::{Waking, wake};
    let mut bench = bench("joined");
    bench.launch.generation = Some(Arc::new(From {
        config: GenerationConfig {
            id: "g".into(),
            state: bench.temp.path().join("disk"),
            memory: Vec::new(),
            paged: false,
            descriptors: false,
        },
        files: Vec::new(),
        frozen: Vec::new(),
        freezes: Vec::new(),
        linked_from: None,
        ancestors: Vec::new(),
        restored_from: None,
        control_port: Some(1 << 30),
    }));
    let mut vm = bench.start().unwrap();
    let ready = || {
        bench.store.list().unwrap()[0]
            .record
            .as_ref()
            .unwrap()
            .ready
    };
    assert!(!ready());
    let mut client = vm.runtime().unwrap();
    // By this port it can be frozen again.
    assert_eq!(client.host_port(), 1 << 30);
    let woken = wake(&mut client, &Waking::of("i".into(), "g")).unwrap();
    assert_eq!(woken.wakes, 1);
    vm.awake().unwrap();
    assert!(ready());
    vm.end().unwrap();
    bench.nothing_is_left();
}

#[test]
fn a_dropped_vm_is_ended_too() {
    let bench = bench("ready");
    drop(bench.start().unwrap());
    bench.nothing_is_left();
}

#[test]
fn a_detached_vm_lives_on_until_it_is_killed_and_removed() {
    let mut bench = bench("ready");
    bench.launch.detached = true;
    let vm = bench.start().unwrap();
    let mut child = ChildOfTest(vm.record().vmm.clone().unwrap().pid);
    let id = vm.detach().unwrap().id;
    let entry = bench.store.find(&id[..5]).unwrap();
    assert_eq!(life::info(&entry).status, Status::Running);
    assert_eq!(life::kill(&entry).unwrap(), Stopped::Killed);
    child.reap();
    assert_eq!(life::kill(&entry).unwrap(), Stopped::Already);
    assert_eq!(life::info(&entry).status, Status::Killed);
    life::sweep(&bench.store).unwrap();
    life::remove(&bench.store, &bench.store.find("x").unwrap(), false).unwrap();
    bench.nothing_is_left();
}

/// The engine's user is the VMM's parent here and must reap it; a command just exits.
struct ChildOfTest(i32);

impl ChildOfTest {
    fn reap(&mut self) {
        use rustix::io::Errno;
        use rustix::process::{Pid, WaitOptions, waitpid};
        // Another test that starts a VM may have been faster: that reaps what is detached.
        match waitpid(Pid::from_raw(self.0), WaitOptions::empty()) {
            Ok(_) | Err(Errno::CHILD) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_vmm_that_the_guest_does_not_heed_is_ended_in_the_end() {
    let mut bench = bench("ready");
    bench.launch.detached = true;
    let vm = bench.start().unwrap();
    let entry = bench.store.find("x").unwrap();
    assert_eq!(
        life::stop(&entry, Duration::from_millis(50)).unwrap(),
        Stopped::Killed,
        "neither vsock nor control socket answers"
    );
    vm.end().unwrap();
    bench.nothing_is_left();
}

#[test]
fn an_orphan_of_a_killed_detached_start_is_swept() {
    let mut bench = bench("ready");
    bench.launch.detached = true;
    let vm = bench.start().unwrap();
    let dir = vm.dir().clone();
    // As if its owner had been killed before the runtime answered.
    let killed = |record: &mut Record| {
        record.ready = false;
        record.owner.as_mut().unwrap().start_ticks += 1;
    };
    let record = bench.store.update(&dir, killed).unwrap();
    life::sweep(&bench.store).unwrap();
    assert!(!record.vmm_is_alive());
    bench.nothing_is_left();
    vm.end().unwrap();
}

#[test]
fn a_guest_that_panics_while_booting_is_told_with_its_last_words() {
    let bench = bench("panics");
    let error = bench.start().unwrap_err();
    assert_eq!(
        error.source().unwrap().to_string(),
        "the guest's kernel panicked"
    );
    assert_eq!(
        error.serial().last().unwrap(),
        "Kernel panic - not syncing: no init"
    );
    bench.nothing_is_left();
}

#[test]
fn a_vmm_that_cannot_start_gives_its_chain_of_causes() {
    let bench = bench("fails");
    let error = bench.start().unwrap_err();
    let cause = error.source().unwrap();
    assert_eq!(cause.to_string(), "opening /dev/kvm");
    assert_eq!(cause.source().unwrap().to_string(), "permission denied");
    bench.nothing_is_left();
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let mut bench = bench("silent");
    bench.launch.boot_timeout = Duration::from_millis(100);
    let error = bench.start().unwrap_err();
    assert!(matches!(error, LaunchError::Timeout { .. }), "{error}");
    bench.nothing_is_left();
}

#[test]
fn a_boot_can_be_cancelled() {
    let bench = bench("silent");
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    drop(write);
    let error = launch(&bench.store, &bench.launch, Some(read.as_fd())).unwrap_err();
    assert!(matches!(error, LaunchError::Cancelled), "{error}");
    bench.nothing_is_left();
}

#[test]
fn what_is_missing_is_named_before_anything_is_made() {
    let mut bench = bench("ready");
    bench.launch.machine.kernel = bench.temp.path().join("none");
    match bench.start().unwrap_err() {
        LaunchError::File { what, remedy, .. } => {
            assert_eq!(what, "guest kernel");
            assert!(remedy.contains("guest-kernel/build"));
        }
        other => panic!("{other}"),
    }
    bench.launch.machine.kernel = bench.launch.machine.initramfs.clone();
    bench.launch.machine.cpus = 0;
    assert!(matches!(
        bench.start().unwrap_err(),
        LaunchError::Config(ConfigError::Vcpus(0))
    ));
    assert!(!bench.store.root().exists());
}

#[test]
fn a_missing_vmm_is_named() {
    let mut bench = bench("ready");
    bench.launch.vmm = "/nonexistent/ratoon-vmm".into();
    let error = bench.start().unwrap_err();
    assert_eq!(error.to_string(), "starting /nonexistent/ratoon-vmm");
    bench.nothing_is_left();
}
