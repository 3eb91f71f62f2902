//! stub
pub(crate) mod deflate {
    use diskimage_core::*;
    pub(crate) fn decode(_s: &[u8], _d: &mut [u8]) -> Result<()> {
        Err(Error::unsupported("stub"))
    }
    pub(crate) fn encoder() -> Result<Box<dyn Encoder>> {
        Err(Error::unsupported("stub"))
    }
}
pub(crate) mod zstd {
    pub(crate) use super::deflate::*;
}
