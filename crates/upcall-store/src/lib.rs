//! Stores: raw files and block devices, memory, null
