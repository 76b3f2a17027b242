//! Bodies of the fuzz targets, kept here so that plain tests run them too.

/// Any bytes as an image's name.
pub fn image_ref(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(image) = text.parse::<crate::ImageRef>()
    {
        assert_eq!(image.to_string(), text);
    }
}
