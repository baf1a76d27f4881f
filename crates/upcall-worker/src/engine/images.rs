//! Before-images: what a page held when a filter that may change it first got it.
//!
//! A filter that dies may have changed half of a page, and its next instance must get the
//! page as the first one did (rule 6). So the page is copied to private memory whenever it is
//! delivered to a filter that may change it, and the copy is dropped at the verdict.
//!
//! Always true: an image is private memory, which no filter can reach; in a steady state
//! taking one allocates nothing.

use upcall_ring::Buffers;

/// Sizes: 4 KiB and its doublings, up to the largest request.
const CLASSES: usize = 14;
const SMALLEST: usize = 4096;
/// Bytes of unused memory that are kept for the next images.
const KEPT_MAX: usize = 32 << 20;

/// What to give back, should the filter die. None is kept for a filter that cannot change
/// the page, or whose requests are not delivered again.
#[derive(Debug, Default)]
pub(super) enum Image {
    #[default]
    None,
    /// The page was all zeroes: nobody had filled it in yet.
    Zeroes,
    /// The first bytes are the page's; there may be more.
    Bytes(Box<[u8]>),
}

/// Memory for images, reused. One for each queue thread.
#[derive(Debug, Default)]
pub(super) struct Images {
    free: [Vec<Box<[u8]>>; CLASSES],
    kept_bytes: usize,
}

impl Images {
    /// A copy of `page`.
    pub(super) fn take(&mut self, page: &Buffers) -> Image {
        let class = class_of(page.len());
        let mut bytes = match self.free[class].pop() {
            Some(bytes) => {
                self.kept_bytes -= bytes.len();
                bytes
            }
            None => vec![0; SMALLEST << class].into_boxed_slice(),
        };
        page.read(0, &mut bytes[..page.len()]);
        Image::Bytes(bytes)
    }

    /// Makes `page` what it was.
    pub(super) fn restore(image: &Image, page: &Buffers) {
        match image {
            Image::None => {}
            Image::Zeroes => page.zero(),
            Image::Bytes(bytes) => page.write(0, &bytes[..page.len()]),
        }
    }

    /// The image is not needed any more.
    pub(super) fn drop(&mut self, image: Image) {
        if let Image::Bytes(bytes) = image
            && self.kept_bytes + bytes.len() <= KEPT_MAX
        {
            self.kept_bytes += bytes.len();
            self.free[class_of(bytes.len())].push(bytes);
        }
    }
}

fn class_of(length: usize) -> usize {
    let doublings = length.max(SMALLEST).next_power_of_two() / SMALLEST;
    doublings.trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use upcall_ring::{Access, Mapping, memfd};

    use super::*;

    fn memory() -> Arc<Mapping> {
        let fd = memfd("images", 8 << 20).unwrap();
        Arc::new(Mapping::new(&fd, 0, 8 << 20, Access::ReadWrite).unwrap())
    }

    #[test]
    fn a_page_becomes_what_it_was() {
        let memory = memory();
        let mut images = Images::default();
        for length in [512, 4096, 4608, 4 << 20] {
            let page = Buffers::of(&memory, 0, length, true).unwrap();
            page.write(0, &vec![7; length]);
            let image = images.take(&page);
            page.write(0, &vec![9; length]);
            Images::restore(&image, &page);
            let mut now = vec![0; length];
            page.read(0, &mut now);
            assert_eq!(now, vec![7; length]);
            Images::restore(&Image::None, &page);
            page.read(0, &mut now[..512]);
            assert_eq!(now[0], 7);
            Images::restore(&Image::Zeroes, &page);
            page.read(0, &mut now);
            assert_eq!(now, vec![0; length]);
            images.drop(image);
        }
    }

    #[test]
    fn memory_is_reused_and_what_is_kept_is_bounded() {
        let memory = memory();
        let mut images = Images::default();
        let page = Buffers::of(&memory, 0, 4096, true).unwrap();
        let first = images.take(&page);
        let Image::Bytes(bytes) = &first else { panic!("an image of bytes") };
        let at = bytes.as_ptr();
        images.drop(first);
        let Image::Bytes(bytes) = images.take(&page) else { panic!("an image of bytes") };
        assert_eq!(bytes.as_ptr(), at);
        let large = Buffers::of(&memory, 0, 4 << 20, true).unwrap();
        let many: Vec<Image> = (0..20).map(|_| images.take(&large)).collect();
        many.into_iter().for_each(|image| images.drop(image));
        assert!(images.kept_bytes <= KEPT_MAX);
    }
}
