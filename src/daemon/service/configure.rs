//! Peers that come and go while a tree is mounted.

use std::sync::Arc;

use super::{Service, blocking};
use crate::daemon::control::{HandOver, Request, Response};
use crate::daemon::failure::{Failure, OrFail};
use crate::daemon::{lost, site};
use crate::transport::{Link, PeerUrl};

impl Service {
    /// Configures a further peer and starts to mirror to it.
    pub(super) async fn add_peer(
        &self,
        url: String,
        name: Option<String>,
    ) -> Result<Response, Failure> {
        let site = Arc::clone(&self.site);
        let (peer, warnings) = blocking(move || {
            let url = PeerUrl::parse(&url)
                .map_err(|error| Failure::new("cannot use the peer").because(&error))?;
            let (warnings, replica) = site::look_at_new(&url, site.identity.mirror)?;
            let peer = site::add_peer(&site.journal, &url, name.as_deref(), replica)?;
            Ok((peer, warnings))
        })
        .await?;
        let named = self
            .site
            .peers()?
            .into_iter()
            .find(|known| known.id == peer);
        let name = named.map_or_else(String::new, |peer| peer.name);
        // One that was configured already may be at another place by now.
        self.peers.remove(peer).await;
        self.peers.add(&self.site, &self.tree, peer)?;
        self.remember().await?;
        Ok(Response::PeerAdded { name, warnings })
    }

    async fn remember(&self) -> Result<(), Failure> {
        let site = Arc::clone(&self.site);
        blocking(move || lost::remember_peers(&site.dir, &site.journal)).await
    }

    /// Ends the exchange with a peer and forgets it.
    pub(super) async fn remove_peer(&self, name: String, force: bool) -> Result<Response, Failure> {
        let peer = site::peer_named(&self.site.journal, &name)?;
        site::removable(&self.site.journal, &peer, force)?;
        // Its task writes to the journal: it ends first.
        self.peers.remove(peer.id).await;
        let site = Arc::clone(&self.site);
        let removed =
            blocking(move || site::remove_peer(&site.journal, &site.reserved, peer.id)).await;
        let conflicts = removed?;
        self.remember().await?;
        Ok(Response::PeerRemoved { conflicts })
    }

    /// Takes the caller for a peer: finds or makes its record, and serves it over the
    /// caller's connection.
    pub(super) async fn attach(
        &self,
        request: Request,
    ) -> Result<(Response, Box<HandOver>), Failure> {
        let Request::Attach {
            host,
            dir,
            name,
            identity,
        } = request
        else {
            return Err(Failure::new("that is no call to attach"));
        };
        let url = PeerUrl::attached(&host, std::path::Path::new(&dir))
            .or_fail(|| "cannot use the peer".into())?;
        let site = Arc::clone(&self.site);
        let place = url.to_string();
        let peer = blocking(move || site::attached(&site, &url, name.as_deref(), identity)).await?;
        if self.peers.url(peer.id).is_some_and(|known| known != place) {
            self.peers.remove(peer.id).await;
        }
        self.peers.add(&self.site, &self.tree, peer.id)?;
        self.remember().await?;
        let response = Response::Attached {
            name: peer.name,
            tree: self.site.tree().display().to_string(),
        };
        let peers = Arc::clone(&self.peers);
        let reason = format!("{host} has attached its {dir}");
        Ok((
            response,
            Box::new(move |stream| peers.take_link(peer.id, Link::handed_over(stream, reason))),
        ))
    }
}
