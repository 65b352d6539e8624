use ratoon_protocol::ErrorCode;

use super::*;

fn texts(all: &[&str]) -> Vec<String> {
    all.iter().map(|text| (*text).to_owned()).collect()
}

fn refused(params: &NetworkSet) -> String {
    let error = Plan::new(params).unwrap_err();
    assert_eq!(error.code, ErrorCode::BadRequest);
    error.message
}

#[test]
fn a_hardware_address_is_six_bytes_of_one_device() {
    assert_eq!(mac("02:0a:FF:00:00:01").unwrap(), [2, 10, 255, 0, 0, 1]);
    for text in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:01:02",
        "01:00:00:00:00:01",
        "00:00:00:00:00:00",
        "2:0:0:0:0:1",
        "+2:00:00:00:00:01",
        "02-00-00-00-00-01",
        "é2:00:00:00:00:01",
    ] {
        assert!(
            mac(text).unwrap_err().message.starts_with("mac `"),
            "{text}"
        );
    }
}

#[test]
fn an_address_has_a_prefix_that_fits() {
    for text in [
        "10.0.0.2/24",
        "10.0.0.2/32",
        "fd00::2/64",
        "fd00::2/128",
        "169.254.1.1/1",
    ] {
        assert!(addresses(&texts(&[text])).is_ok(), "{text}");
    }
    for text in [
        "",
        "10.0.0.2",
        "10.0.0.2/",
        "10.0.0.2/0",
        "10.0.0.2/33",
        "fd00::2/129",
        "10.0.0.2/+8",
        "0.0.0.0/8",
        "224.0.0.1/8",
        "127.0.0.1/8",
        "::1/128",
        "10.0.0/8",
        "x/8",
        "10.0.0.2/24/1",
    ] {
        let message = addresses(&texts(&[text])).unwrap_err().message;
        assert!(message.starts_with("address `"), "{text}");
    }
    let twice = addresses(&texts(&["10.0.0.2/24", "10.0.0.2/16"])).unwrap_err();
    assert_eq!(twice.message, "address 10.0.0.2 comes twice");
    let many = vec!["10.0.0.2/24".to_owned(); 17];
    assert_eq!(
        addresses(&many).unwrap_err().message,
        "more than 16 addresses"
    );
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let base = NetworkSet::default;
    for device in ["", "lo", "..", "a/b", "a b", "sixteen-letters-", "a:1"] {
        let message = refused(&NetworkSet {
            device: Some(device.into()),
            ..base()
        });
        assert!(message.starts_with("device `"), "{device}");
    }
    let gateways = texts(&["10.0.0.1", "10.0.0.3"]);
    let message = refused(&NetworkSet { gateways, ..base() });
    assert_eq!(message, "more than one gateway for a family");
    let own = NetworkSet {
        addresses: Some(texts(&["10.0.0.2/24"])),
        gateways: texts(&["10.0.0.2"]),
        ..base()
    };
    assert_eq!(
        refused(&own),
        "gateway 10.0.0.2 is the device's own address"
    );
    let name_servers = Some(texts(&["dns.example"]));
    let message = refused(&NetworkSet {
        name_servers,
        ..base()
    });
    assert_eq!(message, "name server `dns.example` is not an IP address");
    for mtu in [0, 67, 65_536] {
        let message = refused(&NetworkSet {
            mtu: Some(mtu),
            ..base()
        });
        assert_eq!(message, format!("mtu {mtu} is not 68 to 65535 bytes"));
    }
}

#[test]
fn an_address_covers_its_network_and_no_other() {
    let address = |text: &str| addresses(&texts(&[text])).unwrap()[0];
    let covers = |text: &str, other: &str| address(text).covers(other.parse().unwrap());
    assert!(covers("10.0.0.2/24", "10.0.0.1") && !covers("10.0.0.2/24", "10.0.1.1"));
    assert!(covers("10.0.0.2/32", "10.0.0.2") && !covers("10.0.0.2/32", "10.0.0.3"));
    assert!(covers("fd00::2/64", "fd00::1") && !covers("fd00::2/64", "fd01::1"));
    assert!(!covers("10.0.0.2/24", "fd00::1"));
}

#[test]
fn answers_of_any_shape_are_read_or_skipped() {
    for len in 0..64 {
        for byte in [0, 1, 4, 8, 0xff] {
            let body = vec![byte; len];
            let _ = (address_of(&body, 1), route_again(&body, 1));
        }
    }
    assert_eq!(address_of(&[], 0), None);
    assert!(route_again(&[0; 12], 0).is_none());
}

/// Runs in a network namespace of its own, in a thread of its own, with the pair v0 and v1.
fn in_namespace(test: impl FnOnce(&mut Socket) + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: leaves only this thread's network namespace; descriptors stay as they are.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        let mut socket = Socket::open().unwrap();
        // IFLA_LINKINFO (18) { IFLA_INFO_KIND (1), IFLA_INFO_DATA (2) { VETH_INFO_PEER (1) } }.
        let mut peer = link_header(0, 0, 0).to_vec();
        crate::system::netlink::attribute(&mut peer, libc::IFLA_IFNAME, b"v1\0");
        let (mut data, mut info) = (Vec::new(), Vec::new());
        crate::system::netlink::attribute(&mut data, 1, &peer);
        crate::system::netlink::attribute(&mut info, 1, b"veth");
        crate::system::netlink::attribute(&mut info, 2, &data);
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let message = Message::new(libc::RTM_NEWLINK, flags, &link_header(0, 0, 0))
            .with(libc::IFLA_IFNAME, b"v0\0")
            .with(18, &info);
        socket.ask(message).expect("a kernel with veth devices");
        let v1 = link(&mut socket, "v1").unwrap().index;
        set_up(&mut socket, v1, true).unwrap();
        test(&mut socket);
    });
    thread.join().unwrap();
}

fn apply(params: NetworkSet, etc: &Path) -> Result<(), ErrorReply> {
    let device = Some("v0".to_owned());
    Plan::new(&NetworkSet { device, ..params })?.apply(etc)
}

fn proc_net(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap()
}

fn is_local(ip: &str) -> bool {
    let ip: IpAddr = ip.parse().unwrap();
    std::net::UdpSocket::bind((ip, 0)).is_ok()
}

fn default_via(hex: &str) -> bool {
    let table = proc_net("route");
    table
        .lines()
        .any(|line| line.starts_with(&format!("v0\t00000000\t{hex}\t")))
}

#[test]
fn a_device_gets_all_that_it_was_to_have_as_root() {
    in_namespace(|socket| {
        let etc = tempfile::tempdir().unwrap();
        let params = NetworkSet {
            mac: Some("02:00:00:00:00:07".into()),
            addresses: Some(texts(&["10.0.0.2/24", "fd00::2/64"])),
            gateways: texts(&["10.0.0.1", "fd00::1"]),
            name_servers: Some(texts(&["10.0.0.1"])),
            mtu: Some(1400),
            ..NetworkSet::default()
        };
        apply(params, etc.path()).unwrap();
        assert_eq!(link(socket, "v0").unwrap().mac, [2, 0, 0, 0, 0, 7]);
        assert!(is_local("10.0.0.2") && is_local("fd00::2"));
        assert!(default_via("0100000A"), "{}", proc_net("route"));
        assert!(proc_net("ipv6_route").contains("fd000000000000000000000000000001"));
        let resolv = std::fs::read_to_string(etc.path().join("resolv.conf")).unwrap();
        assert_eq!(resolv, "nameserver 10.0.0.1\n");
    });
}

#[test]
fn what_is_not_named_outlives_a_new_hardware_address_as_root() {
    in_namespace(|_| {
        let params = NetworkSet {
            addresses: Some(texts(&["10.0.0.2/24", "fd00::2/64"])),
            gateways: texts(&["10.0.0.1", "fd00::1"]),
            ..NetworkSet::default()
        };
        apply(params, Path::new("/none")).unwrap();
        let mac = Some("02:00:00:00:00:08".to_owned());
        apply(
            NetworkSet {
                mac,
                ..NetworkSet::default()
            },
            Path::new("/none"),
        )
        .unwrap();
        assert!(is_local("10.0.0.2") && is_local("fd00::2"));
        assert!(default_via("0100000A"), "{}", proc_net("route"));
        assert!(proc_net("ipv6_route").contains("fd000000000000000000000000000001"));
    });
}

#[test]
fn addresses_are_all_that_it_has_then_as_root() {
    in_namespace(|_| {
        let set = |all: &[&str], gateways: &[&str]| {
            let addresses = Some(texts(all));
            let gateways = texts(gateways);
            let params = NetworkSet {
                addresses,
                gateways,
                ..NetworkSet::default()
            };
            apply(params, Path::new("/none"))
        };
        set(&["10.0.0.2/24", "10.0.0.3/24"], &["10.0.0.1"]).unwrap();
        // The second of a network goes with its first, and has to be there all the same.
        set(&["10.0.0.3/24"], &[]).unwrap();
        assert!(!is_local("10.0.0.2") && is_local("10.0.0.3"));
        assert!(default_via("0100000A"), "{}", proc_net("route"));
        // A gateway outside of all networks is on the link.
        set(&["10.9.0.2/32"], &["169.254.1.1"]).unwrap();
        assert!(!is_local("10.0.0.3") && is_local("10.9.0.2"));
        assert!(default_via("0101FEA9"), "{}", proc_net("route"));
        set(&[], &[]).unwrap();
        assert!(!is_local("10.9.0.2"));
    });
}

#[test]
fn a_device_that_is_not_there_is_named_as_root() {
    in_namespace(|_| {
        let params = NetworkSet::default();
        let error = Plan::new(&params)
            .unwrap()
            .apply(Path::new("/none"))
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
        assert_eq!(
            error.message,
            "eth0: no such network device: No such device (os error 19)"
        );
    });
}

#[test]
fn a_runtime_that_is_not_init_leaves_its_hosts_network_alone() {
    let error = set_network(&NetworkSet::default()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Unsupported);
}
