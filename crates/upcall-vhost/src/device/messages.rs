//! The frontend's messages, as the `vhost` crate hands them over: each changes the state, or
//! is refused.

use std::fs::File;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, VhostUserBackendReqHandlerMut};

use super::*;

impl VhostUserBackendReqHandlerMut for Device<'_> {
    fn set_owner(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<(), Error> {
        self.stop_all();
        for ring in &mut self.rings {
            *ring = Ring::default();
        }
        self.release();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64, Error> {
        Ok(self.config().features())
    }

    fn set_features(&mut self, features: u64) -> Result<(), Error> {
        let answer = self.set_accepted_features(features);
        self.answer(answer)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures, Error> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), Error> {
        let unknown = features & !self.get_protocol_features()?.bits();
        let answer =
            if unknown == 0 { Ok(()) } else { Err(Refusal::Features { features: unknown }) };
        self.acknowledges = features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
        self.answer(answer)
    }

    fn get_queue_num(&mut self) -> Result<u64, Error> {
        Ok(self.config().queues().into())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64, Error> {
        Ok(MEMORY_SLOTS_MAX as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>, Error> {
        let answer = self.set_regions(regions, &files);
        self.answer(answer).map(|()| None)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>, Error> {
        let answer = self.add_region(region, &file);
        self.answer(answer).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<(), Error> {
        let (_, memory) = self.shared.memory();
        let answer = memory.without(region_address(region)).map_err(Refusal::from);
        let memory = self.answer(answer)?;
        self.shared.set_memory(memory);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<(), Error> {
        let size_max = self.config().queue_size_max();
        let answer = match u16::try_from(size) {
            Ok(size) if size.is_power_of_two() && size <= size_max => {
                self.change(index, |ring| ring.size = Some(size))
            }
            _ => Err(Refusal::RingSize { index, size, size_max }),
        };
        self.answer(answer)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<(), Error> {
        let address = RingAddress { descriptors, available, used };
        let log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let answer = self.place_ring(index, address, log);
        self.answer(answer)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<(), Error> {
        let packed = self.features & RING_PACKED != 0;
        let answer = if packed || base <= u16::MAX.into() {
            self.change(index, |ring| ring.base = base)
        } else {
            Err(Refusal::RingBase { index, base })
        };
        self.answer(answer)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState, Error> {
        let answer = self.place(index).and_then(|at| {
            self.stop(at);
            self.finish_left(at)?;
            Ok(at)
        });
        self.release_if_idle();
        let at = self.answer(answer)?;
        // A stopped ring needs a new kick descriptor to start.
        self.rings[at].kick = None;
        Ok(VhostUserVringState::new(index, self.rings[at].base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<(), Error> {
        let answer = match fd {
            Some(file) => self.change(index.into(), |ring| ring.kick = Some(kick_doorbell(file))),
            None => Err(Refusal::NoKick { index }),
        };
        self.answer(answer)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<(), Error> {
        let answer = self.place(index.into());
        let at = self.answer(answer)?;
        let signals = &self.rings[at].signals;
        signals.set_call(fd.map(OwnedFd::from));
        // A completion may just have been told to the descriptor before, which nobody looks
        // at any more: QEMU changes them whenever the guest masks its interrupt, and does not
        // wait for us. A guest that misses an interrupt waits for ever; one too many costs
        // it nothing.
        signals.ring_call();
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<(), Error> {
        let answer = self.place(index.into());
        let at = self.answer(answer)?;
        self.rings[at].signals.set_error(fd.map(OwnedFd::from));
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<(), Error> {
        let answer = self.place(index).and_then(|at| {
            self.rings[at].enabled = enable;
            if enable {
                self.start_if_ready(at)
            } else {
                self.stop(at);
                self.release_if_idle();
                Ok(())
            }
        });
        self.answer(answer)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>, Error> {
        Ok(self.config().read_space(offset, size))
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<(), Error> {
        let answer = self.write_config(offset, bytes);
        self.answer(answer)
    }

    fn reset_device(&mut self) -> Result<(), Error> {
        self.host.reset();
        self.stop_all();
        self.release();
        for ring in &mut self.rings {
            *ring = Ring::default();
        }
        if let Some(inflight) = &self.inflight {
            inflight.clear();
        }
        // That there are protocol features stays negotiated: it says how rings are enabled.
        self.features &= PROTOCOL_FEATURES;
        self.shared.set_flush_negotiated(false);
        self.shared.dirty.set_log(None);
        self.switch_logging();
        Ok(())
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {
        // The crate's sender does not know the one message that we send.
        if let Some(fd) = self.offered_channel.take() {
            self.channel.set(fd);
        }
    }

    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> Result<(), Error> {
        self.not_offered("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File, Error> {
        self.not_offered("SHARED_OBJECT")
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File), Error> {
        // Nothing of it is kept here: whoever asks for many has to keep them.
        let made = self.extent(inflight).and_then(|extent| Ok((extent, extent.make_file()?)));
        let (extent, file) = self.answer(made)?;
        let Extent { queues, queue_size, .. } = extent;
        let told = VhostUserInflight::new(extent.bytes() as u64, 0, queues, queue_size);
        Ok((told, file.into()))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<(), Error> {
        let answer = self.track(inflight, &file);
        self.answer(answer)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>, Error> {
        self.not_offered("DEVICE_STATE")
    }

    fn check_device_state(&mut self) -> Result<(), Error> {
        self.not_offered("DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig, Error> {
        self.not_offered("SHMEM")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<(), Error> {
        let &VhostUserLog { mmap_size, mmap_offset } = log;
        let answer = DirtyLog::map(&file, mmap_offset, mmap_size)
            .map_err(Refusal::from)
            .and_then(|log| self.set_log(log));
        self.answer(answer)
    }
}
