//! What a refused request still sends. A connection that is closed while its client sends on gives that a
//! broken pipe, and no reason.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::Frame;
use parking_lot::Mutex;
use tokio_stream::StreamExt;

/// So much more is taken of it, for so long at most.
const MOST: usize = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(5);

/// A body that somebody else goes on with.
struct Lent(Arc<Mutex<Body>>);

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut *self.0.lock()).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.0.lock().is_end_stream()
    }
}

/// Takes what is left of a request that was refused.
pub(crate) async fn take(request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let body = Arc::new(Mutex::new(body));
    let lent = Body::new(Lent(body.clone()));
    let response = next.run(Request::from_parts(head, lent)).await;
    let status = response.status();
    if status.is_client_error() || status.is_server_error() {
        let mut rest = Body::new(Lent(body)).into_data_stream();
        let mut taken = 0;
        let taking = async {
            while let Some(Ok(data)) = rest.next().await {
                taken += data.len();
                if taken > MOST {
                    break;
                }
            }
        };
        // Whoever sends for longer than this finds the connection closed.
        let _ = tokio::time::timeout(PATIENCE, taking).await;
    }
    response
}
