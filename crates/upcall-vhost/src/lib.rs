//! The vhost-user-blk frontend
