//! Skerry's own API, below `/api/v1`: what the command does, with the JSON that it prints.

mod events;
mod images;
mod pools;
mod shared;
mod snapshots;
mod system;
mod vms;

pub(crate) use images::{named as named_images, parse as image_name, removed as removed_image};
use utoipa::OpenApi;
use utoipa::openapi::OpenApi as Document;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
pub(crate) use vms::Log;

use crate::error::Problem;
use crate::work::Shared;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Skerry",
        description = "Virtual machines, images, snapshots and pools. Answers that take their time are \
                       streams of JSON objects, one a line. Every error has the shape of `Problem`.",
        version = "1",
        license(name = "Apache-2.0 OR MIT")
    ),
    tags(
        (name = "vms", description = "Virtual machines"),
        (name = "images", description = "Images"),
        (name = "snapshots", description = "Snapshots"),
        (name = "volumes", description = "Disks that outlive machines"),
        (name = "networks", description = "Networks between machines"),
        (name = "pools", description = "Pools of clean machines"),
        (name = "system", description = "The server and its host")
    ),
    components(schemas(Problem))
)]
struct Described;

/// The handlers, and what describes them.
pub(crate) fn router() -> (axum::Router<Shared>, Document) {
    OpenApiRouter::with_openapi(Described::openapi())
        .nest(
            "/api/v1",
            OpenApiRouter::new()
                .routes(routes!(system::version))
                .routes(routes!(system::doctor))
                .routes(routes!(vms::list, vms::create))
                .routes(routes!(vms::inspect, vms::remove))
                .routes(routes!(vms::start))
                .routes(routes!(vms::restart))
                .routes(routes!(vms::stop))
                .routes(routes!(vms::kill))
                .routes(routes!(vms::pause))
                .routes(routes!(vms::unpause))
                .routes(routes!(vms::wait))
                .routes(routes!(vms::rename))
                .routes(routes!(vms::logs))
                .routes(routes!(vms::exec))
                .routes(routes!(vms::snapshot))
                .routes(routes!(vms::fork))
                .routes(routes!(vms::network))
                .routes(routes!(vms::stats))
                .routes(routes!(events::events))
                .routes(routes!(shared::volumes, shared::create_volume))
                .routes(routes!(shared::prune_volumes))
                .routes(routes!(shared::inspect_volume, shared::remove_volume))
                .routes(routes!(shared::networks, shared::create_network))
                .routes(routes!(shared::inspect_network, shared::remove_network))
                .routes(routes!(images::list, images::remove))
                .routes(routes!(images::inspect))
                .routes(routes!(images::pull))
                .routes(routes!(images::push))
                .routes(routes!(images::tag))
                .routes(routes!(images::prune))
                .routes(routes!(snapshots::list))
                .routes(routes!(snapshots::inspect, snapshots::remove))
                .routes(routes!(snapshots::prune))
                .routes(routes!(snapshots::push))
                .routes(routes!(snapshots::pull))
                .routes(routes!(pools::list, pools::create))
                .routes(routes!(pools::stats, pools::remove))
                .routes(routes!(pools::exec))
                .routes(routes!(pools::acquire))
                .routes(routes!(pools::release)),
        )
        .split_for_parts()
}

/// The OpenAPI document of the server's own API, as JSON.
#[must_use]
pub fn document() -> String {
    text(&router().1)
}

pub(crate) fn text(document: &Document) -> String {
    // What derives its form from types always has one.
    document.to_pretty_json().unwrap_or_default() + "\n"
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// The book's copy is what the handlers say; `SKERRY_BLESS=1` writes it anew.
    #[test]
    fn the_document_in_the_book_is_this_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/src/openapi.json");
        let now = super::document();
        if std::env::var_os("SKERRY_BLESS").is_some() {
            std::fs::write(&path, &now).expect("written");
        }
        let kept = std::fs::read_to_string(&path).expect("docs/src/openapi.json is there");
        assert!(
            kept == now,
            "docs/src/openapi.json is not what the code says: write it anew with SKERRY_BLESS=1"
        );
    }

    #[test]
    fn every_operation_says_what_can_go_wrong() {
        let document: serde_json::Value =
            serde_json::from_str(&super::document()).expect("it is JSON");
        let paths = document["paths"].as_object().expect("paths");
        assert!(paths.len() > 25, "{}", paths.len());
        for (path, operations) in paths {
            for (method, operation) in operations.as_object().expect("operations") {
                let responses = operation["responses"].as_object().expect("responses");
                let fine = responses.keys().any(|status| status.starts_with('2'));
                assert!(fine, "{method} {path}");
                assert!(
                    responses.contains_key("default"),
                    "{method} {path} names no error"
                );
                let summary = operation["summary"].as_str().unwrap_or_default();
                assert!(!summary.is_empty(), "{method} {path} says nothing");
            }
        }
    }
}
