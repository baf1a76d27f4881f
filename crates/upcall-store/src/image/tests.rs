//! The store on real images, with the daemon that is installed.
