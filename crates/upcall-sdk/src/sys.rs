//! `upcall/filter.h` in Rust, field for field and under the header's names.
//!
//! Nothing here is meant for a filter's author. The layout is asserted at compile time for
//! the width that is built; `tests/layout.rs` compares the same table with the C header
//! at 64 and at 32 bits. What the fields mean is written in the header, and only there.
#![allow(missing_docs)]

use std::ffi::{c_char, c_int, c_void};
use std::mem::{offset_of, size_of};

pub const ABI_MAJOR: u32 = 1;
pub const ABI_MINOR: u32 = 3;
/// Most bytes of a state that one instance hands to the next.
pub const STATE_MAX: usize = 1 << 20;
pub const ABI_VERSION: u32 = ABI_MAJOR << 16 | ABI_MINOR;

pub const PASS: u32 = 0;
pub const WATCH: u32 = 1;
pub const DONE: u32 = 2;
pub const FAIL: u32 = 3;
pub const HOLD: u32 = 4;

pub const REQ_FUA: u16 = 1;
pub const REQ_UNMAP: u16 = 2;
pub const REQ_RETRY: u16 = 4;

pub const PARAM_INT: u32 = 1;
pub const PARAM_BOOL: u32 = 2;
pub const PARAM_STRING: u32 = 3;
pub const PARAM_SIZE: u32 = 4;
pub const PARAM_MILLIS: u32 = 5;
pub const PARAM_CHOICE: u32 = 6;
pub const PARAM_FRACTION: u32 = 7;
pub const PARAM_FILE_READ: u32 = 8;
pub const PARAM_FILE_APPEND: u32 = 9;
pub const PARAM_ADDRESS: u32 = 10;

pub const EVENT_STUN: u32 = 1;
pub const EVENT_UNSTUN: u32 = 2;
pub const EVENT_ATTACH: u32 = 3;
pub const EVENT_DETACH: u32 = 4;
pub const EVENT_MIGRATE_OUT: u32 = 5;
pub const EVENT_MIGRATE_IN: u32 = 6;

pub const FILTER_ISSUES: u32 = 1;
pub const FILTER_SIDECAR: u32 = 2;
pub const FILTER_EXTENTS: u32 = 4;
pub const EXTENT_DATA: u32 = 0;
pub const EXTENT_ZERO: u32 = 1;
pub const EXTENT_HOLE: u32 = 2;
pub const EXTENTS_MAX: usize = 1024;
pub const SIDECAR_MAX: usize = 65536;

/// The header's `UPCALL_ALIGN8 uint64_t`: 8-aligned on 32 bits too, where a plain `u64`
/// of a C struct is not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct U64(pub u64);

/// The header's `UPCALL_ALIGN8 int64_t`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct I64(pub i64);

#[repr(C)]
pub struct Request {
    pub size: u32,
    pub op: u8,
    pub reserved0: u8,
    pub flags: u16,
    pub offset: U64,
    pub length: u32,
    pub status: i32,
    pub data: *mut c_void,
    pub context: *mut c_void,
}

#[repr(C)]
pub struct Instance {
    _opaque: [u8; 0],
}

#[repr(C)]
pub struct Timer {
    _opaque: [u8; 0],
}

#[repr(C)]
pub struct Watch {
    _opaque: [u8; 0],
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Disk {
    pub size: u32,
    pub block_size: u32,
    pub capacity: U64,
    pub read_only: u32,
    pub reserved0: u32,
}

#[repr(C)]
pub struct Issue {
    pub size: u32,
    pub op: u8,
    pub reserved0: u8,
    pub flags: u16,
    pub offset: U64,
    pub length: u32,
    pub disk: u32,
    pub data: *mut c_void,
    pub done: unsafe extern "C" fn(arg: *mut c_void, status: i32),
    pub arg: *mut c_void,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Extent {
    pub length: U64,
    pub kind: u32,
    pub reserved0: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Param {
    pub size: u32,
    pub r#type: u32,
    pub name: *const c_char,
    pub doc: *const c_char,
    pub default_value: *const c_char,
    pub choices: *const c_char,
    pub min: I64,
    pub max: i64,
}

pub type TimerFn = unsafe extern "C" fn(arg: *mut c_void);
pub type WatchFn = unsafe extern "C" fn(arg: *mut c_void, revents: u32);

#[repr(C)]
pub struct Services {
    pub size: u32,
    pub abi_version: u32,
    pub answer: unsafe extern "C" fn(req: *mut Request, verdict: u32, status: i32),
    pub issue: unsafe extern "C" fn(inst: *mut Instance, io: *const Issue) -> i32,
    pub buffer_alloc: unsafe extern "C" fn(inst: *mut Instance, length: u32) -> *mut c_void,
    pub buffer_free: unsafe extern "C" fn(inst: *mut Instance, data: *mut c_void),
    pub disk: unsafe extern "C" fn(inst: *mut Instance, index: u32) -> *const Disk,
    pub param_int: unsafe extern "C" fn(inst: *mut Instance, name: *const c_char) -> i64,
    pub param_string:
        unsafe extern "C" fn(inst: *mut Instance, name: *const c_char) -> *const c_char,
    pub param_fd: unsafe extern "C" fn(inst: *mut Instance, name: *const c_char) -> c_int,
    pub timer_start: unsafe extern "C" fn(
        inst: *mut Instance,
        delay_ms: u64,
        period_ms: u64,
        run: TimerFn,
        arg: *mut c_void,
    ) -> *mut Timer,
    pub timer_stop: unsafe extern "C" fn(timer: *mut Timer),
    pub watch_start: unsafe extern "C" fn(
        inst: *mut Instance,
        fd: c_int,
        events: u32,
        run: WatchFn,
        arg: *mut c_void,
    ) -> *mut Watch,
    pub watch_stop: unsafe extern "C" fn(watch: *mut Watch),
    pub run_blocking:
        unsafe extern "C" fn(inst: *mut Instance, run: TimerFn, arg: *mut c_void) -> i32,
    pub counter: unsafe extern "C" fn(inst: *mut Instance, name: *const c_char) -> i32,
    pub counter_add: unsafe extern "C" fn(inst: *mut Instance, counter: i32, delta: u64),
    pub log: unsafe extern "C" fn(inst: *mut Instance, level: u32, text: *const c_char),
    pub sidecar_read: unsafe extern "C" fn(inst: *mut Instance, buf: *mut c_void, size: u32) -> i32,
    pub sidecar_write:
        unsafe extern "C" fn(inst: *mut Instance, data: *const c_void, length: u32) -> i32,
    pub sidecar_sync: unsafe extern "C" fn(inst: *mut Instance) -> i32,
    pub extents: unsafe extern "C" fn(
        inst: *mut Instance,
        disk: u32,
        offset: u64,
        length: u64,
        entries: *mut Extent,
        max: u32,
    ) -> i32,
}

#[repr(C)]
pub struct Filter {
    pub size: u32,
    pub abi_version: u32,
    pub name: *const c_char,
    pub version: *const c_char,
    pub vendor: *const c_char,
    pub summary: *const c_char,
    pub filter_class: u32,
    pub flags: u32,
    pub ops: u32,
    pub sees: u32,
    pub changes: u32,
    pub answers: u32,
    pub param_count: u32,
    pub params: *const Param,
    pub load: Option<unsafe extern "C" fn(services: *const Services) -> i32>,
    pub unload: Option<unsafe extern "C" fn()>,
    pub open: Option<unsafe extern "C" fn(inst: *mut Instance, this: *mut *mut c_void) -> i32>,
    pub close: Option<unsafe extern "C" fn(this: *mut c_void)>,
    pub start_io: Option<unsafe extern "C" fn(this: *mut c_void, req: *mut Request) -> u32>,
    pub io_done: Option<unsafe extern "C" fn(this: *mut c_void, req: *mut Request) -> u32>,
    pub cancel: Option<unsafe extern "C" fn(this: *mut c_void, context: *mut c_void)>,
    pub event: Option<unsafe extern "C" fn(this: *mut c_void, event: u32) -> i32>,
    pub save_state:
        Option<unsafe extern "C" fn(this: *mut c_void, buf: *mut c_void, size: u32) -> i32>,
    pub load_state:
        Option<unsafe extern "C" fn(this: *mut c_void, buf: *const c_void, length: u32) -> i32>,
}

/// One struct of the header: its name, its size, its fields' offsets; first at 64 bits,
/// then at 32.
#[derive(Debug)]
pub struct Layout {
    pub name: &'static str,
    pub size: [usize; 2],
    pub fields: &'static [(&'static str, [usize; 2])],
}

/// Index into the pairs of [`Layout`] for the width that is built.
pub const WIDTH: usize = if size_of::<usize>() == 8 { 0 } else { 1 };

macro_rules! layout {
    ($($c:literal $type:ident [$s64:literal, $s32:literal] {
        $($field:ident [$o64:literal, $o32:literal]),* $(,)?
    })*) => {
        $(const _: () = {
            assert!(size_of::<$type>() == [$s64, $s32][WIDTH]);
            $(assert!(offset_of!($type, $field) == [$o64, $o32][WIDTH]);)*
        };)*

        /// The layout of every struct that crosses the border.
        pub const LAYOUTS: &[Layout] = &[$(Layout {
            name: $c,
            size: [$s64, $s32],
            fields: &[$((stringify!($field), [$o64, $o32])),*],
        }),*];
    };
}

layout! {
    "upcall_request" Request [40, 32] {
        size [0, 0], op [4, 4], reserved0 [5, 5], flags [6, 6], offset [8, 8], length [16, 16],
        status [20, 20], data [24, 24], context [32, 28],
    }
    "upcall_disk" Disk [24, 24] {
        size [0, 0], block_size [4, 4], capacity [8, 8], read_only [16, 16], reserved0 [20, 20],
    }
    "upcall_issue" Issue [48, 40] {
        size [0, 0], op [4, 4], reserved0 [5, 5], flags [6, 6], offset [8, 8], length [16, 16],
        disk [20, 20], data [24, 24], done [32, 28], arg [40, 32],
    }
    "upcall_extent" Extent [16, 16] {
        length [0, 0], kind [8, 8], reserved0 [12, 12],
    }
    "upcall_param" Param [56, 40] {
        size [0, 0], r#type [4, 4], name [8, 8], doc [16, 12], default_value [24, 16],
        choices [32, 20], min [40, 24], max [48, 32],
    }
    "upcall_services" Services [168, 88] {
        size [0, 0], abi_version [4, 4], answer [8, 8], issue [16, 12], buffer_alloc [24, 16],
        buffer_free [32, 20], disk [40, 24], param_int [48, 28], param_string [56, 32],
        param_fd [64, 36], timer_start [72, 40], timer_stop [80, 44], watch_start [88, 48],
        watch_stop [96, 52], run_blocking [104, 56], counter [112, 60], counter_add [120, 64],
        log [128, 68], sidecar_read [136, 72], sidecar_write [144, 76], sidecar_sync [152, 80],
        extents [160, 84],
    }
    "upcall_filter" Filter [160, 96] {
        size [0, 0], abi_version [4, 4], name [8, 8], version [16, 12], vendor [24, 16],
        summary [32, 20], filter_class [40, 24], flags [44, 28], ops [48, 32], sees [52, 36],
        changes [56, 40], answers [60, 44], param_count [64, 48], params [72, 52],
        load [80, 56], unload [88, 60], open [96, 64], close [104, 68], start_io [112, 72],
        io_done [120, 76], cancel [128, 80], event [136, 84],
        save_state [144, 88], load_state [152, 92],
    }
}
