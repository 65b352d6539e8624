//! One network device: its hardware address, MTU, addresses, default routes; and name servers.
//!
//! ```text
//!   Plan::new (checks all) --> apply: look --> down, MAC --> MTU --> addresses --> up
//!                                      --> routes that were there --> default routes --> resolv.conf
//! ```
//!
//! A new hardware address takes the device down, and with it the kernel's IPv6 addresses and
//! routes: those that were set and are not named anew are put back. IPv6 link-local addresses are
//! the kernel's own and stay. How it fails: the message names device, step and reason; steps before
//! it are done, and the device is up again if it can be.

use std::net::IpAddr;
use std::path::Path;

use ratoon_protocol::{ErrorReply, NetworkSet};
use rustix::io::Errno;

use super::netlink::{Message, Socket, address_header, attributes, link_header, route_header};
use super::settings::{ETC, writable_root};
use super::{bad_request, failed, files, only_init, shown};

/// Most addresses of a call.
const MAX_ADDRESSES: usize = 16;

/// What resolvers read (MAXNS, resolv.h).
const MAX_NAME_SERVERS: usize = 3;

/// `IFF_UP`, linux/if.h.
const UP: u32 = libc::IFF_UP as u32;

/// `RTNH_F_ONLINK`: the gateway is on the link whatever the addresses say.
const ON_LINK: u32 = 4;

/// `RTPROT_KERNEL`, `RTPROT_STATIC`, `RTPROT_RA` (linux/rtnetlink.h).
const OF_KERNEL: u8 = 2;
const STATIC: u8 = 4;
const OF_ROUTER: u8 = 9;

/// Configures a network device.
///
/// # Errors
/// See the module.
pub fn set_network(params: &NetworkSet) -> Result<(), ErrorReply> {
    let plan = Plan::new(params)?;
    only_init("the network")?;
    plan.apply(Path::new(ETC))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Address {
    ip: IpAddr,
    prefix: u8,
}

impl Address {
    fn covers(self, other: IpAddr) -> bool {
        match (self.ip, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let differ = u32::from(a) ^ u32::from(b);
                differ.checked_shr(32 - u32::from(self.prefix)).unwrap_or(0) == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let differ = u128::from(a) ^ u128::from(b);
                differ
                    .checked_shr(128 - u32::from(self.prefix))
                    .unwrap_or(0)
                    == 0
            }
            _ => false,
        }
    }
}

/// A checked [`NetworkSet`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    device: String,
    mac: Option<[u8; 6]>,
    addresses: Option<Vec<Address>>,
    gateways: Vec<IpAddr>,
    name_servers: Option<Vec<IpAddr>>,
    mtu: Option<u32>,
}

impl Plan {
    pub(super) fn new(params: &NetworkSet) -> Result<Self, ErrorReply> {
        let device = params.device.as_deref().unwrap_or("eth0");
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=15).contains(&device.len())
            || !device.bytes().all(is_name)
            || matches!(device, "." | ".." | "lo")
        {
            return Err(bad_request(format!(
                "device `{}` is not 1 to 15 letters, digits, `-`, `_` and `.`, or is the loopback",
                shown(device)
            )));
        }
        let mac = params.mac.as_deref().map(mac).transpose()?;
        let addresses = params
            .addresses
            .as_ref()
            .map(|texts| addresses(texts))
            .transpose()?;
        let gateways = ips("gateway", &params.gateways)?;
        for v4 in [true, false] {
            if gateways.iter().filter(|ip| ip.is_ipv4() == v4).count() > 1 {
                return Err(bad_request("more than one gateway for a family"));
            }
        }
        if let Some(own) = addresses
            .iter()
            .flatten()
            .find(|own| gateways.contains(&own.ip))
        {
            return Err(bad_request(format!(
                "gateway {} is the device's own address",
                own.ip
            )));
        }
        let name_servers = params.name_servers.as_ref();
        let name_servers = name_servers
            .map(|texts| ips("name server", texts))
            .transpose()?;
        if name_servers
            .as_ref()
            .is_some_and(|all| all.len() > MAX_NAME_SERVERS)
        {
            return Err(bad_request(format!(
                "more than {MAX_NAME_SERVERS} name servers"
            )));
        }
        if let Some(mtu) = params.mtu.filter(|mtu| !(68..=65_535).contains(mtu)) {
            return Err(bad_request(format!("mtu {mtu} is not 68 to 65535 bytes")));
        }
        Ok(Self {
            device: device.to_owned(),
            mac,
            addresses,
            gateways,
            name_servers,
            mtu: params.mtu,
        })
    }

    /// Does it. `etc` holds resolv.conf.
    pub(super) fn apply(&self, etc: &Path) -> Result<(), ErrorReply> {
        let has_device = self.mac.is_some()
            || self.addresses.is_some()
            || !self.gateways.is_empty()
            || self.mtu.is_some();
        if has_device || self.name_servers.is_none() {
            self.set_device()?;
        }
        if let Some(servers) = &self.name_servers {
            writable_root()?;
            let text: String = servers
                .iter()
                .map(|ip| format!("nameserver {ip}\n"))
                .collect();
            let path = etc.join("resolv.conf");
            files::replace(&path, text.as_bytes(), 0o644)
                .map_err(|error| failed(path.display(), error))?;
        }
        Ok(())
    }

    fn refused(&self, what: impl std::fmt::Display, error: Errno) -> ErrorReply {
        failed(format_args!("{}: {what}", self.device), error)
    }

    fn set_device(&self) -> Result<(), ErrorReply> {
        let say = |what: &'static str| move |error| self.refused(what, error);
        let mut socket = Socket::open().map_err(say("no netlink socket"))?;
        let link = link(&mut socket, &self.device).map_err(say("no such network device"))?;
        let index = link.index;
        let new_mac = self.mac.filter(|mac| link.mac != mac);
        let current =
            current_addresses(&mut socket, index).map_err(say("cannot list addresses"))?;
        let disturbs = new_mac.is_some() || self.addresses.is_some();
        let routes = match disturbs {
            true => current_routes(&mut socket, index).map_err(say("cannot list routes"))?,
            false => Vec::new(),
        };
        if let Some(mac) = new_mac {
            set_up(&mut socket, index, false).map_err(say("cannot take it down"))?;
            let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, 0, 0))
                .with(libc::IFLA_ADDRESS, &mac);
            if let Err(error) = socket.ask(message) {
                let _ = set_up(&mut socket, index, true);
                return Err(self.refused("cannot set the hardware address", error));
            }
        }
        if let Some(mtu) = self.mtu {
            let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, 0, 0))
                .with(libc::IFLA_MTU, &mtu.to_ne_bytes());
            if let Err(error) = socket.ask(message) {
                let _ = set_up(&mut socket, index, true);
                return Err(self.refused("cannot set the MTU", error));
            }
        }
        set_up(&mut socket, index, true).map_err(say("cannot bring it up"))?;
        let wanted = self.addresses.as_ref().unwrap_or(&current);
        if disturbs {
            self.set_addresses(&mut socket, index, &current, wanted)?;
        }
        for (is_default_v4, message) in routes {
            // A default route that is named anew takes the old one's place.
            let named = |v4: bool| self.gateways.iter().any(|ip| ip.is_ipv4() == v4);
            if is_default_v4.is_some_and(named) {
                continue;
            }
            match socket.ask(message) {
                Ok(_) | Err(Errno::EXIST) => {}
                // With other addresses the old gateways may be out of reach.
                Err(_) if self.addresses.is_some() => {}
                Err(error) => return Err(self.refused("cannot put a route back", error)),
            }
        }
        for gateway in &self.gateways {
            socket
                .ask(default_route(index, *gateway, wanted))
                .map_err(|error| self.refused(format_args!("gateway {gateway}"), error))?;
        }
        Ok(())
    }

    fn set_addresses(
        &self,
        socket: &mut Socket,
        index: i32,
        current: &[Address],
        wanted: &[Address],
    ) -> Result<(), ErrorReply> {
        for old in current.iter().filter(|old| !wanted.contains(old)) {
            match socket.ask(address_message(libc::RTM_DELADDR, 0, index, *old)) {
                // It has gone with another one of its network, or when the device went down.
                Ok(_) | Err(Errno::ADDRNOTAVAIL) => {}
                Err(error) => {
                    return Err(self.refused(format_args!("cannot remove {}", old.ip), error));
                }
            }
        }
        for new in wanted {
            let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
            socket
                .ask(address_message(libc::RTM_NEWADDR, flags, index, *new))
                .map_err(|error| {
                    self.refused(format_args!("cannot add {}/{}", new.ip, new.prefix), error)
                })?;
        }
        Ok(())
    }
}

/// Six bytes; the first is even, or it would be a group's.
fn mac(text: &str) -> Result<[u8; 6], ErrorReply> {
    let parse = || {
        let mut parts = text.split(':');
        let mut mac = [0; 6];
        for byte in &mut mac {
            let part = parts.next()?;
            let is_hex = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| is_hex)?;
        }
        let is_one_device = mac[0] & 1 == 0 && mac != [0; 6];
        (parts.next().is_none() && is_one_device).then_some(mac)
    };
    parse().ok_or_else(|| {
        bad_request(format!(
            "mac `{}` is not six bytes like 02:00:00:00:00:01, the first of them even",
            shown(text)
        ))
    })
}

fn is_of_a_device(ip: IpAddr) -> bool {
    !ip.is_unspecified() && !ip.is_multicast() && ip != IpAddr::from([255; 4])
}

fn addresses(texts: &[String]) -> Result<Vec<Address>, ErrorReply> {
    if texts.len() > MAX_ADDRESSES {
        return Err(bad_request(format!("more than {MAX_ADDRESSES} addresses")));
    }
    let mut all = Vec::new();
    for text in texts {
        let parse = || {
            let (ip, prefix) = text.split_once('/')?;
            let ip: IpAddr = ip.parse().ok()?;
            let longest = if ip.is_ipv4() { 32 } else { 128 };
            let is_number = prefix.bytes().all(|byte| byte.is_ascii_digit());
            let prefix: u8 = prefix.parse().ok().filter(|_| is_number)?;
            let fits = (1..=longest).contains(&prefix);
            let fits = fits && is_of_a_device(ip) && !ip.is_loopback();
            fits.then_some(Address { ip, prefix })
        };
        let address = parse().ok_or_else(|| {
            bad_request(format!(
                "address `{}` is not a device's address with its prefix length, like 10.0.0.2/24",
                shown(text)
            ))
        })?;
        if all.iter().any(|other: &Address| other.ip == address.ip) {
            return Err(bad_request(format!("address {} comes twice", address.ip)));
        }
        all.push(address);
    }
    Ok(all)
}

fn ips(what: &str, texts: &[String]) -> Result<Vec<IpAddr>, ErrorReply> {
    let parse = |text: &String| {
        let ip = text.parse().ok().filter(|ip| is_of_a_device(*ip));
        ip.ok_or_else(|| bad_request(format!("{what} `{}` is not an IP address", shown(text))))
    };
    texts.iter().map(parse).collect()
}

fn family(ip: IpAddr) -> u8 {
    (if ip.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    }) as u8
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(<[u8; 4]>::try_from(bytes).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(bytes).ok()?.into()),
        _ => None,
    }
}

struct Link {
    index: i32,
    mac: Vec<u8>,
}

fn number(bytes: &[u8], at: usize) -> Option<i32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(i32::from_ne_bytes(bytes.try_into().ok()?))
}

fn link(socket: &mut Socket, device: &str) -> Result<Link, Errno> {
    let mut name = device.as_bytes().to_vec();
    name.push(0);
    let message = Message::new(libc::RTM_GETLINK, 0, &link_header(0, 0, 0));
    let answers = socket.ask(message.with(libc::IFLA_IFNAME, &name))?;
    let answer = answers
        .iter()
        .find(|answer| answer.kind == libc::RTM_NEWLINK);
    let body = &answer.ok_or(Errno::NODEV)?.body;
    let index = number(body, 4).ok_or(Errno::BADMSG)?;
    let mac = attributes(body.get(16..).unwrap_or(&[]))
        .find(|(kind, _)| *kind == libc::IFLA_ADDRESS)
        .map(|(_, mac)| mac.to_vec());
    Ok(Link {
        index,
        mac: mac.unwrap_or_default(),
    })
}

fn set_up(socket: &mut Socket, index: i32, up: bool) -> Result<(), Errno> {
    let flags = if up { UP } else { 0 };
    let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, flags, UP));
    socket.ask(message).map(|_| ())
}

/// Addresses that were set: not IPv6 link-local ones, nor those that a router gave for a time.
fn current_addresses(socket: &mut Socket, index: i32) -> Result<Vec<Address>, Errno> {
    let message = Message::new(
        libc::RTM_GETADDR,
        libc::NLM_F_DUMP,
        &address_header(0, 0, 0, 0),
    );
    let answers = socket.ask(message)?;
    let ours = answers
        .iter()
        .filter(|answer| answer.kind == libc::RTM_NEWADDR);
    Ok(ours
        .filter_map(|answer| address_of(&answer.body, index))
        .collect())
}

fn address_of(body: &[u8], index: i32) -> Option<Address> {
    if number(body, 4)? != index {
        return None;
    }
    let find = |wanted: u16| {
        let mut all = attributes(body.get(8..).unwrap_or(&[]));
        all.find_map(|(kind, value)| (kind == wanted).then(|| ip(value))?)
    };
    let ip = find(libc::IFA_LOCAL).or_else(|| find(libc::IFA_ADDRESS))?;
    let is_kernels = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    (!is_kernels).then_some(Address {
        ip,
        prefix: body[1],
    })
}

fn address_message(kind: u16, flags: i32, index: i32, address: Address) -> Message {
    // Duplicates are the host's business: an address must be of use at once.
    let how = match (kind, address.ip) {
        (libc::RTM_NEWADDR, IpAddr::V6(_)) => libc::IFA_F_NODAD as u8,
        _ => 0,
    };
    let header = address_header(family(address.ip), address.prefix, how, index);
    let bytes = octets(address.ip);
    let message = Message::new(kind, flags, &header)
        .with(libc::IFA_LOCAL, &bytes)
        .with(libc::IFA_ADDRESS, &bytes);
    match address.ip {
        IpAddr::V4(ip) if kind == libc::RTM_NEWADDR && address.prefix < 31 => {
            let broadcast = u32::from(ip) | (u32::MAX >> address.prefix);
            message.with(libc::IFA_BROADCAST, &broadcast.to_be_bytes())
        }
        _ => message,
    }
}

fn default_route(index: i32, gateway: IpAddr, addresses: &[Address]) -> Message {
    let is_near = addresses.iter().any(|address| address.covers(gateway))
        || matches!(gateway, IpAddr::V6(ip) if ip.is_unicast_link_local());
    let flags = if is_near { 0 } else { ON_LINK };
    let header = route_header(family(gateway), 0, STATIC, libc::RT_SCOPE_UNIVERSE, flags);
    Message::new(
        libc::RTM_NEWROUTE,
        libc::NLM_F_CREATE | libc::NLM_F_REPLACE,
        &header,
    )
    .with(libc::RTA_GATEWAY, &octets(gateway))
    .with(libc::RTA_OIF, &index.to_ne_bytes())
}

/// Requests that put the device's routes back; of default routes also whether they are IPv4.
fn current_routes(socket: &mut Socket, index: i32) -> Result<Vec<(Option<bool>, Message)>, Errno> {
    let header = route_header(0, 0, 0, 0, 0);
    // A request for all tables names none.
    let mut empty = [0; 12];
    empty[..1].copy_from_slice(&header[..1]);
    let answers = socket.ask(Message::new(libc::RTM_GETROUTE, libc::NLM_F_DUMP, &empty))?;
    let ours = answers
        .iter()
        .filter(|answer| answer.kind == libc::RTM_NEWROUTE);
    Ok(ours
        .filter_map(|answer| route_again(&answer.body, index))
        .collect())
}

fn route_again(body: &[u8], index: i32) -> Option<(Option<bool>, Message)> {
    let header = body.get(..12)?;
    let (family, prefix, table, protocol, scope, kind) = (
        header[0], header[1], header[4], header[5], header[6], header[7],
    );
    let flags = number(header, 8)? as u32;
    let is_set = table == libc::RT_TABLE_MAIN
        && kind == libc::RTN_UNICAST
        && !matches!(protocol, OF_KERNEL | OF_ROUTER)
        && flags & libc::RTM_F_CLONED == 0;
    let of = |wanted: u16| attributes(&body[12..]).find(|(kind, _)| *kind == wanted);
    if !is_set || number(of(libc::RTA_OIF)?.1, 0)? != index {
        return None;
    }
    let header = route_header(family, prefix, protocol, scope, flags & ON_LINK);
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let mut message = Message::new(libc::RTM_NEWROUTE, create, &header);
    for (kind, value) in attributes(&body[12..]) {
        let is_ours = [
            libc::RTA_DST,
            libc::RTA_GATEWAY,
            libc::RTA_OIF,
            libc::RTA_PRIORITY,
            libc::RTA_PREFSRC,
            libc::RTA_METRICS,
        ];
        if is_ours.contains(&kind) {
            message = message.with(kind, value);
        }
    }
    let is_v4 = i32::from(family) == libc::AF_INET;
    Some(((prefix == 0).then_some(is_v4), message))
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
