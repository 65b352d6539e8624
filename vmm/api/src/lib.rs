//! What `ratoon-vmm` is told and what it answers, as plain types.
//!
//! * [`VmConfig`]: the JSON document that it reads once at start.
//! * [`StatusReply`], [`MetricsReply`], [`ErrorReply`]: bodies of its control socket's replies; the
//!   OpenAPI document (`ratoon-vmm --openapi`, `GET /openapi.json`) is generated from them.
//! * [`Inherited`], [`send_descriptors`]: the descriptors that its owner passes.
//! * [`ExitReport`]: what it leaves behind when it ends.

mod config;
mod control;
mod host;
mod inherit;

pub use config::{
    ConfigError, DiskConfig, GenerationConfig, LAYERS_LOCK, MAX_DISKS, MAX_FROZEN_LAYERS,
    MAX_MEMORY_MIB, MAX_NETWORKS, MAX_VCPUS, MIN_MEMORY_MIB, MemoryLayerConfig, NetConfig, Run,
    SerialConfig, VmConfig, VsockConfig, layers_within,
};
pub use control::{
    BirthRequest, ErrorReply, ExitReport, FreezeReply, FreezeRequest, FrozenDisk, FrozenLayer,
    FrozenMeta, MetricsReply, Outcome, Phases, StatusReply, TouchedReply, VcpuStats, VmState,
};
pub use host::HostClass;
pub use inherit::{Inherited, send_descriptors};
